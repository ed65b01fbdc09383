#!/usr/bin/env bash
# Makes .venv-peers/NAME (or $VENVS/NAME) for each peer named, or for all. Versions of everything stand in NAME.txt beside this file.
# Nothing is resolved: the lists are whole, and some peers ask for CUDA packages or for a newer torch than they need.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cd "$here/../.."
for name in "${@:-autoround gptqmodel hqq llmcompressor torchao}"; do
  for peer in $name; do
    folder=${VENVS:-.venv-peers}/$peer
    [ -e "$folder/.installed" ] && continue
    "${PYTHON:-python3}" -m venv "$folder"
    # Peers that come as source are built against this torch.
    "$folder/bin/pip" install --quiet "$(grep '^torch==' "$here/$peer.txt")" setuptools==84.2.1 wheel
    "$folder/bin/pip" install --quiet --no-deps --no-build-isolation -r "$here/$peer.txt"
    touch "$folder/.installed"
  done
done
