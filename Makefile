# dmsnap. `make` alone lists the targets.

GO      ?= go
PREFIX  ?= /usr/local
BIN     := bin/dmsnap
TESTED  := ./...

# Without a C compiler there is no race detector; say so instead of failing.
RACE    := $(shell command -v $${CC:-cc} >/dev/null 2>&1 && echo -race)

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: build
build: ## build bin/dmsnap, one static binary
	CGO_ENABLED=0 $(GO) build -trimpath -o $(BIN) ./cmd/dmsnap

.PHONY: demo
demo: build ## the main job end to end on a real file system image
	$(GO) run ./demo -dmsnap $(BIN)

# Linking the tests is half of the processor time of the short ones, and takes a third less without symbols. Real clients are
# for make interop.
.PHONY: test
test: check-format ## formatting, vet, and all tests that need nothing but Go, about 5 minutes on two cores (DMSNAP_TEST_HOST=1, as root: loop devices and mounts, too)
	$(GO) vet $(TESTED)
	$(GO) test -shuffle=on -ldflags='-s -w' -skip '^TestInterop' $(TESTED)

# Many tests wait, so more packages than processors run at a time.
.PHONY: test-short
test-short: ## the same tests without the long ones, about a minute on two cores once they are compiled
	$(GO) test -short -shuffle=on -p 3 -ldflags='-s -w' $(TESTED)

.PHONY: check
check: check-format lint check-modules check-generated check-builds test-big-endian check-vulnerabilities ## what CI checks beside the tests: linters, modules, generated pages, other processors

.PHONY: lint
lint: ## go vet and staticcheck (its version is pinned in tools/go.mod)
	$(GO) vet $(TESTED)
	$(GO) tool -modfile=tools/go.mod staticcheck $(TESTED)

.PHONY: check-modules
check-modules:
	$(GO) mod tidy -diff
	cd tools && $(GO) mod tidy -diff

# Generated pages are made beside those in the tree, and compared.
.PHONY: check-generated
check-generated:
	@cp docs/problems.md docs/problems.md.before; $(GO) generate ./... ; \
	 cmp docs/problems.md docs/problems.md.before; same=$$?; mv docs/problems.md.before docs/problems.md; exit $$same

# Processors that differ: 64 bits little-endian (arm64, riscv64) and big-endian (s390x).
.PHONY: check-builds
check-builds:
	@set -e; for arch in arm64 riscv64 s390x; do echo "build for $$arch"; CGO_ENABLED=0 GOARCH=$$arch $(GO) build ./... ; done

# The database is on the network. Where it can't be had that is said, and is no failure.
.PHONY: check-vulnerabilities
check-vulnerabilities:
	@out=$$(timeout 60 $(GO) tool -modfile=tools/go.mod govulncheck ./... 2>&1); rc=$$?; \
	 case $$rc in 0|3) echo "$$out"; exit $$rc;; *) echo "SKIPPED: govulncheck: no database of vulnerabilities here";; esac

# Debian's qemu-user has the first name, qemu-user-static the second. The emulator is slow: these packages have all formats that
# are written, and take half a minute.
EMULATOR := $(firstword $(foreach name,qemu-s390x qemu-s390x-static,$(shell command -v $(name))))

.PHONY: test-big-endian
test-big-endian: ## the formats' tests on a big-endian processor, s390x (Debian's qemu-user)
	@if [ -z "$(EMULATOR)" ]; then echo "SKIPPED: test-big-endian: no qemu-s390x here (Debian: apt-get install qemu-user)"; exit 0; fi; \
	 CGO_ENABLED=0 GOARCH=s390x $(GO) test -short -ldflags='-s -w' -exec $(EMULATOR) -skip '^TestMergedIndex$$' \
	   ./ondisk ./nbd/wire ./store ./dump ./check ./diff ./layer ./source/partition

.PHONY: check-format
check-format:
	@out=$$(gofmt -l $$(git ls-files '*.go' 2>/dev/null || find . -name '*.go')); \
	 if [ -n "$$out" ]; then echo "gofmt would change:"; echo "$$out"; exit 1; fi

# The race detector sleeps a second at the end of every process, unless GORACE says otherwise; many tests start processes.
.PHONY: race
race: ## the tests under the race detector, but those of the page in a browser and of the tree (needs a C compiler)
	@if [ -z "$(RACE)" ]; then echo "SKIPPED: no C compiler, so no race detector"; exit 0; fi; \
	 GORACE=atexit_sleep_ms=10 $(GO) test -race -timeout 20m -ldflags='-s -w' $(RACEFLAGS) $$($(GO) list $(TESTED) | grep -v -e /test/browser -e 'dmsnap/dmsnap$$')

.PHONY: race-short
race-short: ## the same without the long random tests: what CI has time for
	@$(MAKE) race RACEFLAGS=-short

.PHONY: interop
interop: build ## real clients and file systems: libnbd, qemu, fio, e2fsprogs (what is absent is reported as SKIPPED)
	$(GO) test -count=1 -v -run 'Interop' ./nbd ./source/qcow2 ./test/interop

.PHONY: test-kernel
test-kernel: ## a running Linux kernel as judge (Debian's user-mode-linux); RUN=name, DMSNAP_SEED=n
	DMSNAP_KERNEL=1 $(GO) test -count=1 -v -timeout 30m -run '$(RUN)' ./test/kernel/...

.PHONY: test-kernel-long
test-kernel-long: ## the same with 500 random scripts and more of everything
	DMSNAP_KERNEL=1 DMSNAP_SCRIPTS=$${DMSNAP_SCRIPTS:-500} DMSNAP_ROUNDS=$${DMSNAP_ROUNDS:-20} $(GO) test -count=1 -v -timeout 3h -run '$(RUN)' ./test/kernel/...

.PHONY: test-kernel-qemu
test-kernel-qemu: ## another kernel, with two CPUs, in qemu: slower (DMSNAP_KERNEL_IMAGE=folder of an unpacked kernel)
	DMSNAP_KERNEL=qemu DMSNAP_SCRIPTS=$${DMSNAP_SCRIPTS:-20} $(GO) test -count=1 -v -timeout 1h -run '$(RUN)' ./test/kernel/...

.PHONY: deep
deep: ## the random and crash tests for longer than a commit waits
	DMSNAP_DEEP=1 $(GO) test -count=1 -timeout 2h ./store ./snapshot ./merge ./offline ./source/... ./internal/... ./vhost ./cmd/dmsnap ./test/interop
	FUZZTIME=$${FUZZTIME:-3m} FUZZDIR=./source $(MAKE) fuzz
	DMSNAP_DEEP=1 DMSNAP_E2E_TIME=$${DMSNAP_E2E_TIME:-2h} $(GO) test -count=1 -timeout 5h -v ./test/e2e/...

.PHONY: release
release: ## build bin/dmsnap as it is released: static, without paths and symbols
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags "-s -w" -o $(BIN) ./cmd/dmsnap

.PHONY: bench
bench: release ## dmsnap beside its peers: table, JSON and plot in docs/benchmarks; ARGS="--rounds 1 --seconds 1 --only REGEXP"
	$(GO) run ./bench --dmsnap $(BIN) --install --out docs/benchmarks $(ARGS)
	$(if $(ARGS),,@$(MAKE) bench-fleet)

.PHONY: bench-curves
bench-curves: release ## how cost grows with exceptions, snapshots, connections and the chunk size
	$(GO) run ./bench curves --dmsnap $(BIN) --install --out docs/benchmarks $(ARGS)

.PHONY: bench-registry
bench-registry: release ## disks in a registry on this machine (Debian's docker-registry, e2fsprogs, curl, zstd; as root); ARGS="--rounds 1"
	$(GO) run ./bench registry --dmsnap $(BIN) $(ARGS)

.PHONY: bench-fleet
bench-fleet: ## forks, checkpoints, memory and starts of a fleet of 1,000 nodes, and sealed layers; a part of bench without ARGS
	$(GO) test -run '^$$' -bench 'ForkAndCheckpoint|BaseWrite' -benchtime 1000x ./fleet
	$(GO) test -run '^$$' -bench CheckpointUnderLoad -benchtime 100x ./fleet
	$(GO) test -run '^$$' -bench Start -benchtime 3x ./fleet
	$(GO) test -run '^$$' -bench Read ./source/stack
	$(GO) test -run '^$$' -bench IndexMemory -benchtime 1x ./source/stack

.PHONY: bench-streams
bench-streams: ## a change of a disk sent and received beside qemu-img, rsync and zstd; DMSNAP_BENCH_MIB=size of the disk
	$(GO) test -run '^$$' -bench Peers -benchtime 5x ./stream

.PHONY: bench-compare
bench-compare: ## Go benchmarks of the working tree beside those of REF=commit, by benchstat; BENCH=regexp
	@REF='$(REF)' GO='$(GO)' bench/compare.sh

.PHONY: fuzz
fuzz: ## every fuzz target below FUZZDIR (.) for FUZZTIME (10s) each
	@set -e; for f in $$(grep -rl '^func Fuzz' --include='*_test.go' $${FUZZDIR:-.}); do \
	   for name in $$(sed -n 's/^func \(Fuzz[A-Za-z0-9_]*\).*/\1/p' $$f); do \
	     echo "== $$(dirname $$f) $$name"; \
	     $(GO) test -run '^$$' -fuzz "^$$name\$$" -fuzztime $${FUZZTIME:-10s} -fuzzminimizetime 10x ./$$(dirname $$f); \
	   done; done

.PHONY: docs
docs: ## the pages that are made from tables in the code
	$(GO) generate ./check

.PHONY: man
man: build ## man pages in dist/man, from the same source as --help
	$(BIN) man dist/man

.PHONY: install
install: build man ## binary, man pages and completions under PREFIX (/usr/local)
	install -D -m 755 $(BIN) $(DESTDIR)$(PREFIX)/bin/dmsnap
	install -d $(DESTDIR)$(PREFIX)/share/man/man1
	install -m 644 dist/man/*.1 $(DESTDIR)$(PREFIX)/share/man/man1
	install -d $(DESTDIR)$(PREFIX)/share/bash-completion/completions $(DESTDIR)$(PREFIX)/share/zsh/site-functions $(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d
	$(BIN) completion bash > $(DESTDIR)$(PREFIX)/share/bash-completion/completions/dmsnap
	$(BIN) completion zsh > $(DESTDIR)$(PREFIX)/share/zsh/site-functions/_dmsnap
	$(BIN) completion fish > $(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d/dmsnap.fish

.PHONY: packages
packages: ## tarballs, deb, rpm, bill of materials and checksums in dist/packages, reproducible; ARCHES="amd64 arm64 …"
	GO="$(GO)" contrib/packages/build.sh

.PHONY: test-packages
test-packages: ## the deb of make packages installed, used and removed in a folder (as root)
	contrib/packages/test.sh

.PHONY: clean
clean: ## remove what was built
	rm -rf bin dist
