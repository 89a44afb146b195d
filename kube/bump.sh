#!/bin/sh
# bump.sh VERSION moves kube/go.mod to a Kubernetes release (v1.X.Y): the module
# itself, the staging modules that it takes from its own tree (v0.X.Y), and the etcd
# that it was released with. `make kube-bump VERSION=v1.X.Y` calls it.
set -eu

version=${1:-}
case $version in
v1.*.*) staging=v0.${version#v1.} ;;
*) echo "usage: make kube-bump VERSION=v1.X.Y" >&2; exit 2 ;;
esac
cd "$(dirname "$0")"

upstream=$(go mod download -json "k8s.io/kubernetes@$version" | sed -n 's/^\t"GoMod": "\(.*\)",\{0,1\}$/\1/p')
[ -n "$upstream" ] || { echo "k8s.io/kubernetes $version can't be had" >&2; exit 1; }

# Kubernetes replaces its staging modules by folders of its tree; we take the same
# ones as they were published. The list may change with a release.
modules=$(sed -n 's/^\t\(k8s.io\/[^ ]*\) => .\/staging\/.*/\1/p' "$upstream")
[ -n "$modules" ] || { echo "no staging modules found in $upstream: has its form changed?" >&2; exit 1; }
edited=$(mktemp)
trap 'rm -f "$edited"' EXIT
sed '/^replace ($/,/^)$/d' go.mod >"$edited"
{
	echo "replace ("
	for module in $modules; do
		printf '\t%s => %s %s\n' "$module" "$module" "$staging"
	done
	echo ")"
} >>"$edited"
cat "$edited" >go.mod

for module in $modules; do
	if grep -q "^	$module v0" go.mod; then
		go mod edit -require "$module@$staging"
	fi
done
go mod edit -require "k8s.io/kubernetes@$version"

etcd=$(sed -n 's/^\tgo.etcd.io\/etcd\/client\/v3 \(v[0-9.]*\).*/\1/p' "$upstream")
for module in client server etcdutl; do
	go mod edit -require "go.etcd.io/etcd/$module/v3@$etcd"
done
godebug=$(sed -n 's/^godebug //p' "$upstream")
[ -z "$godebug" ] || go mod edit -godebug "$godebug"

go mod tidy
echo "moved to Kubernetes $version, etcd $etcd: run 'make kube test', and read the release's changes of kube-apiserver and kube-controller-manager"
