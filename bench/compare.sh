#!/usr/bin/env bash
# Compares the Go benchmarks of the hot functions at another commit with those of the working tree:
#
#	REF=HEAD~3 bench/compare.sh        or make bench-compare REF=HEAD~3
#
# COUNT (6) times each, taking turns, so that both meet the same noise. BENCH selects benchmarks, BENCHTIME (300ms) is
# the length of one, OUT (a temporary folder) keeps the figures. A package that REF has not is left out on that side.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -z "${REF:-}" ]; then
	echo "REF=commit is required: the one to compare with" >&2
	exit 2
fi
go=${GO:-go}
packages=(ondisk internal/chunkmap internal/gate store snapshot nbd)
work=$(mktemp -d)
out=$(realpath -m "${OUT:-$(mktemp -d)}")
trap 'git worktree remove --force "$work/old" 2>/dev/null || true; rm -rf "$work"' EXIT
git worktree add --quiet --detach "$work/old" "$REF"

# build puts the test binaries of the tree in $1 into $2.
build() {
	mkdir -p "$2"
	for p in "${packages[@]}"; do
		[ -d "$1/$p" ] || continue
		(cd "$1" && $go test -c -o "$2/${p//\//-}.test" "./$p")
	done
}
# bench runs the binaries in $1 and adds what they print to $2.
bench() {
	for t in "$1"/*.test; do
		# In a folder of its own: nothing is left in the tree.
		(cd "$work" && "$t" -test.short -test.run '^$' -test.bench "${BENCH:-.}" \
			-test.benchtime "${BENCHTIME:-300ms}" -test.benchmem) | sed '/^PASS$/d' >>"$2"
	done
}
build "$work/old" "$work/bin-old"
build . "$work/bin-new"
mkdir -p "$out"
: >"$out/old.txt"
: >"$out/new.txt"
for i in $(seq "${COUNT:-6}"); do
	echo "round $i of ${COUNT:-6}" >&2
	bench "$work/bin-old" "$out/old.txt"
	bench "$work/bin-new" "$out/new.txt"
done

# Outside the module, so that its go.mod stays as it is.
if command -v benchstat >/dev/null; then
	benchstat "$out/old.txt" "$out/new.txt"
elif ! (cd "$work" && $go run golang.org/x/perf/cmd/benchstat@latest "$out/old.txt" "$out/new.txt"); then
	echo "benchstat is not here and can't be fetched; the figures as they are:" >&2
	tail -n +1 "$out/old.txt" "$out/new.txt"
fi
echo "figures kept in $out" >&2
