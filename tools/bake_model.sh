#!/bin/sh
# Puts a model's files into a folder, as MODEL_DIRS looks for them: for an image that starts with
# no network.
#
#   tools/bake_model.sh org/name[@revision] FOLDER
set -eu
model=$1
case $model in
*,*) echo "bake_model.sh: one model, not several: $model" >&2; exit 2 ;;
*.gguf) echo "bake_model.sh: a GGUF file cannot be baked in; put it on a volume: $model" >&2; exit 2 ;;
esac
folder=$2/${model%%@*}
here=$(cd "$(dirname "$0")/.." && pwd)
cache=$(mktemp -d)
trap 'rm -rf "$cache"' EXIT
path=$(HF_HOME=$cache python3 "$here/utils.py" fetch "$model")
mkdir -p "$folder"
# The cache holds links; an image wants the files.
cp -RL "$path/." "$folder/"
