#!/usr/bin/env bash
# Installs, uses and removes the deb in a folder of its own (a root with busybox in it); the host's packages stay as they
# are. As root; needs dpkg and busybox-static.
set -euo pipefail
cd "$(dirname "$0")/../.."
for tool in dpkg busybox; do
	command -v $tool >/dev/null || { echo "SKIPPED: no $tool here"; exit 0; }
done
((EUID == 0)) || { echo "SKIPPED: dpkg --root needs root"; exit 0; }
deb=$(ls dist/packages/dmsnap_*_"$(dpkg --print-architecture)".deb)
root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
mkdir -p "$root"/{bin,dev,tmp,var/lib/dpkg/{updates,info},usr/bin}
touch "$root"/var/lib/dpkg/{status,available}
cp "$(command -v busybox)" "$root/bin/busybox"
ln -s busybox "$root/bin/sh"
mknod -m 666 "$root/dev/null" c 1 3

dpkg --root="$root" --force-not-root -i "$deb" 2>&1 || { echo "the package does not install"; exit 1; }
run() { chroot "$root" /usr/bin/dmsnap "$@"; }

want=$(dpkg-deb -f "$deb" Version)
version=$(run version)
[[ $version == *"${want%%[~+]*}"* ]] || { echo "version says $version, the package is $want"; exit 1; }
[[ -s $root/usr/share/man/man1/dmsnap.1.gz && -s $root/usr/share/man/man1/dmsnap-serve.1.gz ]] || { echo "no man pages"; exit 1; }
gzip -t "$root"/usr/share/man/man1/*.gz
grep -q '^ExecStart=/usr/bin/dmsnap ' "$root/usr/lib/systemd/system/dmsnap@.service" || { echo "the unit names another binary"; exit 1; }
for f in bash-completion/completions/dmsnap zsh/vendor-completions/_dmsnap fish/vendor_completions.d/dmsnap.fish doc/dmsnap/copyright; do
	[[ -s $root/usr/share/$f ]] || { echo "no /usr/share/$f"; exit 1; }
done

# A store is made, checked and read.
truncate -s 4M "$root/tmp/disk.img"
run create /tmp/disk.img /tmp/disk.cow
run check /tmp/disk.cow
run export /tmp/disk.img /tmp/disk.cow /tmp/out.img
cmp "$root/tmp/disk.img" "$root/tmp/out.img"

dpkg --root="$root" --force-not-root --purge dmsnap
mkdir -p "$root/usr"
left=$(find "$root/usr" -type f)
[[ -z $left ]] || { echo "left behind: $left"; exit 1; }
echo "$(basename "$deb"): installed, used, removed"
