#!/usr/bin/env bash
# What a machine with a GPU needs beside this checkout to run compiled modules: TVM's runtime libraries without its
# compiler, and the apache-tvm-ffi wheel for that machine's Python. Run it in the environment that has apache-tvm:
#
#   benchmarks/gpu/pack_runtime.sh build/gpu-runtime [PYTHON-VERSION, default 3.12]
#
# It writes a folder of about 6 MB; `source FOLDER/env.sh` there, in the root of the checkout, makes it importable.
set -euo pipefail
out=${1:?folder to write}
version=${2:-3.12}
mkdir -p "$out"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

package() { python -c "import importlib.util as u; print(u.find_spec('$1').submodule_search_locations[0])"; }
cp -r "$(package tvm)" "$work/tvm"
rm -rf "$work"/tvm/{3rdparty,src,include} "$work/tvm/lib/libtvm_compiler.so"
find "$work" -name __pycache__ -type d -prune -exec rm -rf {} +
tar -C "$work" -cJf "$out/tvm-runtime.tar.xz" tvm

ffi=$(python -c "import importlib.metadata as m; print(m.version('apache-tvm-ffi'))")
rm -f "$out"/*.whl
platforms=(manylinux_2_28_x86_64 manylinux_2_24_x86_64 manylinux_2_17_x86_64)
python -m pip download --quiet --no-deps --only-binary=:all: --python-version "$version" \
  --implementation cp "${platforms[@]/#/--platform=}" --dest "$out" "apache-tvm-ffi==$ffi"

cat > "$out/env.sh" <<'ENV'
# Source this in the root of the checkout. Nothing is written outside a new temporary folder.
from=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
site=$(mktemp -d)
tar -C "$site" -xJf "$from/tvm-runtime.tar.xz"
python3 -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "$from"/*.whl
ln -s "$PWD" "$site/opferry"
export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}" TVM_USE_RUNTIME_LIB=1
ENV
du -sh "$out"
