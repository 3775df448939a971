"""Drives CMakeLists.txt; everything else about the package is in pyproject.toml.

Environment: MEMDEC_CUDA=auto|on|off, MEMDEC_CUDA_ARCHS="80;90", CXX, CUDACXX, CMAKE_ARGS,
CMAKE_BUILD_PARALLEL_LEVEL.
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def compiler_exists() -> bool:
    """Whether CMake will find a C++ compiler: CXX, or one of the usual names."""
    chosen = os.environ.get("CXX")
    names = [shlex.split(chosen)[0]] if chosen else ["c++", "g++", "clang++"]
    return any(shutil.which(name) for name in names)


class CMakeBuild(build_ext):
    """Configures and builds in build/<python tag>, which is kept, so only changes are compiled."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        module = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            # pip builds in a fresh environment each time: the one in CMake's cache may be gone.
            "CMAKE_MAKE_PROGRAM": shutil.which("ninja") or "ninja",
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "MEMDEC_CUDA": os.environ.get("MEMDEC_CUDA", "auto"),
            "MEMDEC_CUDA_ARCHS": os.environ.get("MEMDEC_CUDA_ARCHS", "80;90"),
        }
        cmake = ["cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja"]
        cmake += [f"-D{name}={value}" for name, value in options.items()]
        cmake += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        subprocess.run(cmake, check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)
        staged = build / "stage"
        subprocess.run(["cmake", "--install", str(build), "--prefix", str(staged)], check=True)
        module.parent.mkdir(parents=True, exist_ok=True)
        # Replaced in one step: a running process keeps the file that it has mapped.
        temporary = module.with_suffix(".tmp")
        shutil.copyfile(next((staged / "memdec").glob("_C*")), temporary)
        os.replace(temporary, module)


if compiler_exists():
    setup(ext_modules=[Extension("memdec._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
else:
    print("memdec: no C++ compiler found; installing without native kernels", file=sys.stderr)
    setup()
