"""Drives a microVM with the package firecracker-python, as its users do.

    drive.py KERNEL INITRD DISK

The monitor is /usr/local/bin/firecracker, and the package keeps its files in
/var/lib/firecracker: both are fixed in the package. The guest prints `GUEST n` on its serial port
for as long as it runs. Each step prints a line.

What has nothing to do with a monitor is replaced: images of containers (docker), shells in guests
(paramiko), invented names (faker), rules of the host's firewall (nftables), and the question for
the host's public address.
"""

import os
import sys
import time
import types

TIMEOUT = 120


def module(name, **content):
    """Puts a module of that name in the place of the real one."""
    made = types.ModuleType(name)
    made.__dict__.update(content)
    sys.modules[name] = made


class Nftables:
    def set_json_output(self, _):
        pass

    def json_cmd(self, _):
        return 0, {"nftables": []}, ""

    def cmd(self, _):
        return 0, "", ""


module("docker", from_env=lambda: None)
module("paramiko", SSHClient=object, AutoAddPolicy=object, SSHException=Exception)
module("faker", Faker=object)
module("nftables", Nftables=Nftables)

import firecracker.microvm  # noqa: E402
from firecracker import Api, MicroVM  # noqa: E402

firecracker.microvm.get_public_ip = lambda: "192.0.2.1"


def step(what):
    print("STEP", what, flush=True)


def wait_for(path, text):
    """Waits until a file has more of this text than before. Returns the number of times."""
    begin = time.monotonic()
    while True:
        with open(path, errors="replace") as file:
            count = file.read().count(text)
        if count > 0:
            return count
        assert time.monotonic() - begin < TIMEOUT, f"{path} has no {text}"
        time.sleep(0.05)


def wait_for_more(path, text, count):
    begin = time.monotonic()
    while wait_for(path, text) <= count:
        assert time.monotonic() - begin < TIMEOUT, f"{path} has no more of {text}"
        time.sleep(0.05)


kernel, initrd, disk = sys.argv[1:]
vm = MicroVM(
    name="guest",
    kernel_file=kernel,
    initrd_file=initrd,
    base_rootfs=disk,
    vcpu=1,
    memory=128,
    ip_addr="172.22.0.2",
    mmds_enabled=True,
    mmds_ip="169.254.169.254",
    user_data="#cloud-config",
    vsock_enabled=True,
    vsock_guest_cid=3,
)
vm_id = vm._microvm_id
assert vm.create() == f"VMM {vm_id} created", "create"
directory = f"/var/lib/firecracker/{vm_id}"
console = f"{directory}/firecracker.log"
wait_for(console, "GUEST")
step("created")

api = Api(f"{directory}/firecracker.socket")
info = api.describe.get().json()
assert (info["id"], info["state"], info["app_name"]) == (vm_id, "Running", "Firecracker"), info
assert api.version.get().json()["firecracker_version"].startswith("1."), "version"
metadata = api.mmds.get().json()
assert metadata["latest"]["user-data"] == "#cloud-config", metadata
config = vm.config(vm_id)
assert config["machine-config"]["mem_size_mib"] == 128, config
assert config["vsock"]["uds_path"] == f"{directory}/v.sock", config
assert [listed["id"] for listed in MicroVM.list()] == [vm_id], MicroVM.list()
assert vm.status(vm_id), "status"
step("described")

try:
    api.machine_config.put(vcpu_count=2, mem_size_mib=256)
    raise AssertionError("a started microVM took another machine")
except firecracker.microvm.VMMError:
    raise
except Exception as error:
    assert "API fault: " in str(error), error
step("refused")

assert vm.pause(vm_id) == f"VMM {vm_id} paused successfully", "pause"
assert api.describe.get().json()["state"] == "Paused", "paused"
step("paused")
assert vm.resume(vm_id) == f"VMM {vm_id} resumed successfully", "resume"
wait_for_more(console, "GUEST", wait_for(console, "GUEST"))
step("resumed")

vm.snapshot(vm_id, action="create")
saved = f"/var/lib/firecracker/snapshots/{vm_id}"
assert sorted(os.listdir(saved)) == ["memory", "snapshot"], os.listdir(saved)
wait_for_more(console, "GUEST", wait_for(console, "GUEST"))
step("saved")

api.close()
assert vm.delete(vm_id) == f"VMM {vm_id} is deleted", "delete"
assert not os.path.exists(directory), "the directory is still there"
step("deleted")
