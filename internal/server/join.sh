#!/bin/sh
# Joins this machine to an Isthmus mesh. Run by the line that `isthmus vm invite`
# prints, which has checked the CA certificate that this script came over.
# $1 is a private directory with ca.pem in it; the join token comes on standard
# input, never as an argument.
set -eu
umask 022 # of what stays: the user isthmus reads and runs it

dir=$1
shift
server={{.Server}}
bin=/usr/local/bin
lib=/usr/local/lib/isthmus

fail() {
	echo "isthmus: $*" >&2
	exit 1
}

[ "$(id -u)" = 0 ] || fail "joining needs root: run the line in a root shell (sudo -s)"
[ "$(uname -s)" = Linux ] || fail "this script joins Linux machines, not $(uname -s)"
[ "$(uname -m)" = x86_64 ] || fail "the control plane serves binaries for x86_64, and this machine is $(uname -m)"
command -v sha256sum >/dev/null || fail "sha256sum is missing: install coreutils"

# has FILE HASH
has() {
	[ -f "$1" ] && [ "$(sha256sum "$1" | cut -d' ' -f1)" = "$2" ]
}

# get NAME HASH TARGET
get() {
	if has "$3" "$2"; then
		return
	fi
	[ -e "$3" ] || fetched="$fetched $3"
	echo "fetching $1"
	curl -fsS --http1.1 --cacert "$dir/ca.pem" --retry 5 --retry-connrefused -o "$3.new" "https://$server/join/$1" ||
		fail "could not fetch $1 from $server"
	has "$3.new" "$2" || { rm -f "$3.new"; fail "$1 from $server has the wrong SHA-256: the download was cut short or changed; run the line again"; }
	chmod 755 "$3.new"
	mv "$3.new" "$3"
}

fetched=
mkdir -p "$bin" "$lib"
get isthmus-agent {{.Agent}} "$bin/isthmus-agent"
get envoy {{.Envoy}} "$lib/envoy"
"$bin/isthmus-agent" join --server "$server" --ca-file "$dir/ca.pem" --token-file - --envoy "$lib/envoy" --downloaded "$@" || {
	status=$?
	rm -f $fetched # of no use without a membership
	rmdir "$lib" 2>/dev/null || true
	exit $status
}
