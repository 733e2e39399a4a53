# Two commands set everything up: `make demo` plays the main job, `make test` runs the tests, on real engines.
GO      ?= go
PKGS    ?= $(shell $(GO) list ./... | grep -Ev '$(ENGINES)')
# Packages whose tests start an engine, a machine or a cluster.
ENGINES := /backends/(docker|gvisor|kubernetes|lxc|microvm)$$|/fixtures/plugin-python$$
FUZZ    ?= 10s
COMMITS ?= 10000
COUNT   ?= 6
VERSION := $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
LDFLAGS := -s -w -X main.version=$(VERSION)

.PHONY: build demo test test-units test-engines test-kubelet test-fast need-engines check vulnerabilities bench fuzz generate cross clean need

build: ## the one binary, with the guest of micro-VMs in it, and the programs of the demo
	GOOS=linux CGO_ENABLED=0 $(GO) build -trimpath -buildvcs=false -ldflags '-s -w' -o backends/microvm/built/guest-$$($(GO) env GOARCH) ./backends/microvm/guest
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '$(LDFLAGS)' -o bin/kmo ./cmd/kmo
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '-s -w' -o bin/programs/relay-1 ./fixtures/programs/relay
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '-s -w -X main.version=2 -X main.health=500' -o bin/programs/relay-2 ./fixtures/programs/relay
	GOOS=wasip1 GOARCH=wasm $(GO) build -trimpath -ldflags '-s -w' -o bin/programs/bus.wasm ./fixtures/programs/bus
	GOOS=wasip1 GOARCH=wasm $(GO) build -trimpath -ldflags '-s -w' -o bin/programs/relay-1.wasm ./fixtures/programs/relay
	GOOS=wasip1 GOARCH=wasm $(GO) build -trimpath -ldflags '-s -w -X main.version=2 -X main.health=500' -o bin/programs/relay-2.wasm ./fixtures/programs/relay
	for n in 1 2; do $(GO) run ./fixtures/programs/appimage bin/programs/relay-$$n bin/programs/relay-$$n.AppImage || exit 1; done

demo: build ## the whole story on this machine, in a temporary folder; git signs with ssh-keygen
	.ci/need git ssh-keygen
	bin/kmo demo

test: need-engines check cross test-units test-engines ## everything but test-kubelet

test-units: need ## what needs no engine, with the race detector
	$(GO) test -race -timeout 30m $(PKGS)
	$(GO) test -C cmd/kmo-verify-keyless -race -timeout 10m .

test-engines: need-engines ## the backends on their real engines, two at a time, with the race detector
	$(GO) list ./... | grep -E '$(ENGINES)' | xargs $(GO) test -race -p 2 -timeout 60m

test-kubelet: need ## the contract on a real node of a cluster: kubelet, containerd and runc, in namespaces of their own; needs root
	.ci/need ip iptables containerd runc /usr/lib/cni/ptp
	KMO_TEST_KUBELET=1 $(GO) test -race -count 1 -timeout 30m -run '^TestKubelet$$' ./backends/kubernetes

test-fast: ## the edit loop
	$(GO) test -short $(PKGS)

check: ## formatting, vet, linters; known vulnerabilities, or a loud word that nobody looked for them
	$(GO) vet ./...
	$(GO) vet -C cmd/kmo-verify-keyless .
	$(GO) tool -modfile=.ci/tools/go.mod golangci-lint run
	.ci/vulnerabilities || [ $$? -eq 75 ]

vulnerabilities: ## as in check, but not to have looked is a failure: for a release
	.ci/vulnerabilities

cross: ## the platforms people author and approve on, and those that run things
	GOOS=linux GOARCH=arm64 $(GO) build -o /dev/null ./cmd/kmo
	GOOS=darwin GOARCH=arm64 $(GO) build -o /dev/null ./cmd/kmo

bench: need-engines ## benchstat-ready figures of everything, the engines too, one package after another: they would slow each other down
	$(GO) test -p 1 -run '^$$' -bench . -benchmem -count $(COUNT) -timeout 120m ./...

fuzz: ## every fuzz target for FUZZ each, and COMMITS generated commits judged here and by git
	KMO_TEST_COMMITS=$(COMMITS) $(GO) test -count 1 -timeout 60m -run TestU19DifferentialCorpus ./policy/trust
	.ci/fuzz $(FUZZ)

generate: ## what is generated from the code: protocol, schemas, documents
	$(GO) generate ./...

need: ## what the tests need beside Go
	.ci/need git gpg ssh-keygen gcc mksquashfs slirp4netns mkfs.ext4

need-engines: need ## engines, a guest's kernel, and servers, which are built once into .cache
	.ci/need ip iptables dockerd containerd runc podman conmon /usr/lib/podman/netavark lxc-start /bin/busybox runsc qemu-system-x86_64 \
		/usr/bin/python3 $(addprefix /usr/lib/python3/dist-packages/,grpc google/protobuf cryptography)
	.ci/kernel >/dev/null
	.ci/servers >/dev/null

clean:
	rm -rf bin .cache
