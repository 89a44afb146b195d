#!/usr/bin/env bash
# Writes the generated files again: protobuf code and the CRDs.
set -euo pipefail
cd "$(dirname "$0")/.."
command -v protoc >/dev/null || { echo "generate: protoc is needed (Debian: apt-get install protobuf-compiler)" >&2; exit 1; }
tools=$(mktemp -d)
trap 'rm -rf "$tools"' EXIT
for t in google.golang.org/protobuf/cmd/protoc-gen-go google.golang.org/grpc/cmd/protoc-gen-go-grpc; do
	go build -modfile=build/tools/go.mod -o "$tools/" "$t"
done
PATH=$tools:$PATH protoc -I. --go_out=. --go_opt=module=isthmus.dev \
	--go-grpc_out=. --go-grpc_opt=module=isthmus.dev api/agent/v1/agent.proto
go generate ./internal/kubeapi
