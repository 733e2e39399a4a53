# Two commands set everything up: `make demo` plays the main job, `make test` runs every test.
GO      ?= go
PKGS    ?= ./...
FUZZ    ?= 10s
COUNT   ?= 6
VERSION := $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
LDFLAGS := -s -w -X main.version=$(VERSION)
TOOLS   := .cache/tools

.PHONY: build demo test test-fast check bench fuzz generate cross clean need

build: ## the one binary
	$(GO) build -trimpath -ldflags '$(LDFLAGS)' -o bin/kmo ./cmd/kmo

demo: build ## the whole story on this machine, in a temporary folder
	bin/kmo demo

test: need check cross ## everything, with the race detector
	$(GO) test -race -timeout 30m $(PKGS)

test-fast: ## the edit loop
	$(GO) test -short $(PKGS)

check: ## formatting, vet, linters, known vulnerabilities
	$(GO) vet $(PKGS)
	$(GO) tool -modfile=.ci/tools/go.mod golangci-lint run
	.ci/vulnerabilities

cross: ## the platforms people author, plan and approve on, and those that run things
	GOOS=linux GOARCH=arm64 $(GO) build -o /dev/null ./cmd/kmo
	GOOS=darwin GOARCH=arm64 $(GO) build -o /dev/null ./cmd/kmo

bench: ## benchstat-ready figures
	$(GO) test -run '^$$' -bench . -benchmem -count $(COUNT) -timeout 60m $(PKGS)

fuzz: ## every fuzz target for FUZZ each
	.ci/fuzz $(FUZZ)

generate: ## what is generated from the code: protocol, schemas, documents
	$(GO) generate ./...

need: ## what the tests need beside Go
	.ci/need

clean:
	rm -rf bin .cache
