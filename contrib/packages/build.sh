#!/usr/bin/env bash
# Builds dist/packages: a tarball for each architecture, deb and rpm, the bill of materials, checksums. Two runs of one
# commit give the same bytes. VERSION is the version to build (default: what git describes).
set -euo pipefail
cd "$(dirname "$0")/../.."
GO=${GO:-go}
described=$(git describe --tags --match 'v*' 2>/dev/null || echo "v0.0.0-$(git rev-list --count HEAD)-g$(git rev-parse --short=12 HEAD)")
export VERSION=${VERSION:-${described#v}}
export SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct)}
MTIME=$(date -u -d "@$SOURCE_DATE_EPOCH" +%Y-%m-%dT%H:%M:%SZ)
export MTIME
ARCHES=${ARCHES:-amd64 arm64 riscv64 s390x}
out=dist/packages build=dist/build
rm -rf $out $build
mkdir -p $out $build/completions $build/systemd $build/man
umask 022

for arch in $ARCHES; do
	mkdir -p $build/$arch
	CGO_ENABLED=0 GOOS=linux GOARCH=$arch $GO build -trimpath -ldflags "-s -w -X main.version=$VERSION" -o $build/$arch/dmsnap ./cmd/dmsnap
done

# Man pages and completions are printed by the binary itself, on the machine that builds.
CGO_ENABLED=0 $GO build -trimpath -ldflags "-s -w -X main.version=$VERSION" -o $build/native ./cmd/dmsnap
$build/native man $build/man
gzip -n -9 $build/man/*.1
$build/native completion bash >$build/completions/dmsnap.bash
$build/native completion zsh >$build/completions/_dmsnap
$build/native completion fish >$build/completions/dmsnap.fish
for unit in contrib/systemd/*; do
	sed 's#/usr/local/bin/#/usr/bin/#' "$unit" >$build/systemd/"$(basename "$unit")"
done

for arch in $ARCHES; do
	name=dmsnap-$VERSION-linux-$arch
	mkdir -p $build/tar/$name
	cp -r $build/$arch/dmsnap $build/man $build/completions $build/systemd LICENSE README.md CHANGELOG.md $build/tar/$name/
	tar -C $build/tar --sort=name --mtime="@$SOURCE_DATE_EPOCH" --owner=0 --group=0 --numeric-owner --mode=go-w -cf - $name |
		gzip -n -9 >$out/$name.tar.gz
done

for arch in $ARCHES; do
	for kind in deb rpm; do
		ARCH=$arch $GO tool -modfile=tools/packaging/go.mod nfpm package --config contrib/packages/nfpm.yaml --packager $kind --target $out/
	done
done

# The bill of materials is read out of the binary.
$GO tool -modfile=tools/packaging/go.mod cyclonedx-gomod bin -json -noserial -version "v$VERSION" -output $out/dmsnap-$VERSION.cdx.json $build/${ARCHES%% *}/dmsnap
# The time at which it was written would make each run different.
sed -i 's/"timestamp": "[^"]*"/"timestamp": "'"$MTIME"'"/' $out/dmsnap-$VERSION.cdx.json

(cd $out && sha256sum -- * >SHA256SUMS)
ls -l $out
