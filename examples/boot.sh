#!/bin/sh
# Boots a microVM with curl, and prints what its guest says.
#
#   examples/boot.sh target/x86_64-unknown-linux-gnu/release/vesta-vmm vmlinux initramfs.cpio
set -eu
[ $# -eq 3 ] || { echo "usage: $0 VMM KERNEL INITRD" >&2; exit 2; }
vmm=$1 kernel=$2 initrd=$3

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
socket=$dir/vm.sock

# Sends one request. An error status ends the script with the monitor's words.
api() {
    curl --silent --show-error --fail-with-body --unix-socket "$socket" \
        -X "$1" "http://localhost$2" ${3:+-d "$3"}
}

"$vmm" --api-sock "$socket" &
pid=$!
trap 'kill "$pid" 2>/dev/null || true; rm -rf "$dir"' EXIT
until api GET / >"$dir/state" 2>"$dir/error"; do
    kill -0 "$pid" # ends the script when the monitor has ended
    sleep 0.01
done

api PUT /machine-config '{"vcpu_count": 1, "mem_size_mib": 128}'
api PUT /boot-source "{
    \"kernel_image_path\": \"$kernel\",
    \"initrd_path\": \"$initrd\",
    \"boot_args\": \"console=ttyS0 reboot=k panic=1\"
}"
api PUT /actions '{"action_type": "InstanceStart"}'
wait "$pid"
