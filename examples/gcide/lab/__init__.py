"""What the commands of this folder are made of; README.md says what each file is for."""
