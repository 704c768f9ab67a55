//! The metadata service as programs in real guests use it.
//!
//! The guest's tap is connected to nothing, so all responses come from the monitor.

use anyhow::Result;
use serde_json::{Value, json};
use vesta_tests::api::ApiClient;
use vesta_tests::guest::{
    BOOT_ARGS, BOOT_TIMEOUT, Guest, Kernel, TIMEOUT, Transport, busybox, env, required_path, start, vmm_path,
};
use vesta_tests::host_net::HostNet;
use vesta_tests::initramfs::Initramfs;
use vesta_tests::on_each_transport;
use vesta_tests::process::Orphans;
use vesta_tests::serial_file::wait_for_text;
use vesta_tests::vmm::{Vmm, VmmBuilder};

/// Any address works; the guest only needs a route to the service.
const NETWORK: &str = "ip link set lo up; ip link set eth0 up\n\
    ip addr add 192.168.77.2/24 dev eth0; ip route add 169.254.169.254 dev eth0\n";

/// Mounts the disk with curl and Python. `in_disk` runs a program of it.
const DISK: &str = "mkdir /disk; mount -t ext4 -o ro /dev/vda /disk\n\
    mount -t tmpfs none /disk/tmp; mount -t devtmpfs none /disk/dev; mount -t proc none /disk/proc\n\
    cp /programs/* /disk/tmp/ 2>/dev/null\n\
    export HOME=/tmp LC_ALL=C.UTF-8 PATH=/usr/bin:/bin:/usr/sbin:/sbin\n\
    in_disk() { chroot /disk \"$@\"; }\n";

const AT: &str = "http://169.254.169.254";

/// The configuration of a guest.
struct Setup<'a> {
    transport: Transport,
    /// What its shell runs once the network is up.
    script: &'a str,
    /// Whether it has the disk with curl and Python.
    disk: bool,
    /// Python programs in `/tmp` of that disk.
    programs: &'a [(&'a str, &'a str)],
    mmds: Value,
    args: &'a [&'a str],
    /// Additions to the kernel command line.
    boot_args: &'a str,
}

impl Default for Setup<'_> {
    fn default() -> Self {
        Setup {
            transport: Transport::Mmio,
            script: "",
            disk: false,
            programs: &[],
            mmds: json!({"network_interfaces": ["eth0"]}),
            args: &[],
            boot_args: "",
        }
    }
}

fn interface(id: &str) -> Value {
    // The kernel removes the tap when the monitor ends. Tests run one after the other.
    json!({"iface_id": id, "host_dev_name": format!("vesta-{id}"), "guest_mac": null})
}

impl Setup<'_> {
    /// Configures a guest over the API with these contents, and does not start it.
    fn configure(self, contents: &Value) -> Result<(Vmm, ApiClient)> {
        let mut builder = VmmBuilder::new(&vmm_path())?.with_api();
        for arg in self.transport.args().iter().chain(self.args) {
            builder = builder.arg(arg);
        }
        let mut initramfs = Initramfs::new(&busybox())?;
        for (name, text) in self.programs {
            initramfs.file(&format!("programs/{name}"), 0o644, text.as_bytes());
        }
        let disk = if self.disk { DISK } else { "" };
        let script = format!("{NETWORK}{disk}{}\npoweroff -f", self.script);
        let guest = Guest::with_initramfs(Kernel::Tuned, initramfs, &script, builder.dir())?.mem_mib(256);
        let guest = guest.boot_args(&format!("{BOOT_ARGS} {}", self.boot_args));
        let vmm = builder.spawn()?;
        let mut api = vmm.ready_client(TIMEOUT)?;
        guest.put(&mut api)?;
        if self.disk {
            let image = required_path(env::PYTHON_DISK);
            let drive = json!({"drive_id": "python", "path_on_host": image, "is_root_device": false, "is_read_only": true});
            api.put("/drives/python", &drive)?.ok()?;
        }
        api.put("/network-interfaces/eth0", &interface("eth0"))?.ok()?;
        api.put("/mmds/config", &self.mmds)?.ok()?;
        api.put("/mmds", contents)?.ok()?;
        Ok((vmm, api))
    }

    /// The same, started.
    fn start(self, contents: &Value) -> Result<(Vmm, ApiClient)> {
        let (vmm, mut api) = self.configure(contents)?;
        start(&mut api)?;
        Ok((vmm, api))
    }

    /// The same, and the guest's output when it has ended.
    fn output_of(self, contents: &Value) -> Result<String> {
        let (mut vmm, _api) = self.start(contents)?;
        output_of(&mut vmm)
    }
}

fn output_of(vmm: &mut Vmm) -> Result<String> {
    let (code, output) = vmm.finish(BOOT_TIMEOUT)?;
    assert_eq!(code, 0, "{output}");
    Ok(output)
}

/// The text between `<NAME>` and `</NAME>` in the guest's output.
fn part(output: &str, name: &str) -> String {
    let (open, close) = (format!("<{name}>"), format!("</{name}>"));
    let inner = output.split_once(&open).and_then(|(_, rest)| Some(rest.split_once(&close)?.0));
    inner.unwrap_or_else(|| panic!("there is no {name} in {output}")).replace('\r', "")
}

fn contents() -> Value {
    json!({
        "latest": {
            "meta-data": {
                "ami-id": "ami-1234", "instance-id": "i-5678", "cpus": 4,
                "network": {"interfaces": {"macs": {}}},
            },
            "user-data": "#!/bin/sh\necho \"hello\"\n",
        }
    })
}

on_each_transport! {
    /// Version 1, with busybox's wget: no token, both formats.
    fn a_guest_reads_values_lists_and_json(transport) {
        let script = format!(
            "get() {{ echo \"<$1>$(wget -q -O - \"$2\" --header \"Accept: $3\" 2>&1)</$1>\"; }}\n\
             get value {AT}/latest/meta-data/ami-id\n\
             get list {AT}/latest/meta-data/\n\
             get json {AT}/latest/meta-data application/json\n\
             get lines {AT}/latest/user-data\n\
             get missing {AT}/latest/nothing\n\
             get number {AT}/latest/meta-data/cpus\n\
             i=0; while [ $i -lt 60 ]; do wget -q -O - {AT}/latest/meta-data/ami-id; i=$((i+1)); done > /tmp/many\n\
             echo \"<many>$(wc -c < /tmp/many)</many>\""
        );
        let output = Setup { transport, script: &script, ..Setup::default() }.output_of(&contents())?;
        assert_eq!(part(&output, "value"), "ami-1234");
        assert_eq!(part(&output, "list"), "ami-id\ncpus\ninstance-id\nnetwork/");
        assert_eq!(serde_json::from_str::<Value>(&part(&output, "json"))?, contents()["latest"]["meta-data"]);
        assert_eq!(part(&output, "lines"), "#!/bin/sh\necho \"hello\"");
        assert!(part(&output, "missing").contains("404"), "{output}");
        assert!(part(&output, "number").contains("501"), "{output}");
        assert_eq!(part(&output, "many"), (60 * "ami-1234".len()).to_string());
        Ok(())
    }

    /// Version 2, with curl, with both names of the headers.
    fn a_guest_without_a_valid_token_is_refused(transport) {
        let script = format!(
            "get() {{ name=$1; shift; echo \"<$name>$(in_disk curl -sS -m 20 -w '|%{{http_code}}' \"$@\" 2>&1)</$name>\"; }}\n\
             get none {AT}/latest/meta-data/ami-id\n\
             get guess -H 'X-metadata-token: 0123456789abcdef' {AT}/latest/meta-data/ami-id\n\
             get no-life -X PUT {AT}/latest/api/token\n\
             get long-life -X PUT {AT}/latest/api/token -H 'X-metadata-token-ttl-seconds: 21601'\n\
             get proxy -X PUT {AT}/latest/api/token -H 'X-metadata-token-ttl-seconds: 60' -H 'X-Forwarded-For: 10.0.0.1'\n\
             get patch -i -X PATCH {AT}/latest/api/token\n\
             get post -X POST {AT}/latest/api/token\n\
             get body -X PUT -d x {AT}/latest/api/token\n\
             TOKEN=$(in_disk curl -sS -m 20 -X PUT {AT}/latest/api/token -H 'X-metadata-token-ttl-seconds: 600')\n\
             get own -H \"X-metadata-token: $TOKEN\" {AT}/latest/meta-data/ami-id\n\
             get other -H \"X-aws-ec2-metadata-token: $TOKEN\" -H 'Accept: application/json' {AT}/latest/meta-data/instance-id\n\
             get life -i -X PUT {AT}/latest/api/token -H 'X-aws-ec2-metadata-token-ttl-seconds: 21600'\n\
             SHORT=$(in_disk curl -sS -m 20 -X PUT {AT}/latest/api/token -H 'X-aws-ec2-metadata-token-ttl-seconds: 1')\n\
             sleep 2\n\
             get over -H \"X-metadata-token: $SHORT\" {AT}/latest/meta-data/ami-id\n\
             get port http://169.254.169.254:81/"
        );
        let mmds = json!({"network_interfaces": ["eth0"], "version": "V2"});
        let output = Setup { transport, script: &script, disk: true, mmds, ..Setup::default() }.output_of(&contents())?;
        for (name, status) in [
            ("none", "401"), ("guess", "401"), ("no-life", "400"), ("long-life", "400"), ("proxy", "400"),
            ("patch", "405"), ("post", "501"), ("body", "400"), ("own", "200"), ("other", "200"), ("life", "200"), ("over", "401"),
        ] {
            assert!(part(&output, name).ends_with(&format!("|{status}")), "{name}: {output}");
        }
        assert_eq!(part(&output, "own"), "ami-1234|200");
        assert_eq!(part(&output, "other"), "\"i-5678\"|200");
        assert!(part(&output, "patch").contains("Allow: GET, PUT"), "{output}");
        assert_eq!(part(&output, "body"), "Invalid request.|400");
        assert!(part(&output, "life").contains("X-aws-ec2-metadata-token-ttl-seconds: 21600"), "{output}");
        // The connection is refused at once, instead of a timeout.
        assert!(part(&output, "port").contains("refused") || part(&output, "port").contains("Couldn't connect"), "{output}");
        Ok(())
    }

    /// boto3 finds its credentials as on EC2: a token, the role's name, the role.
    fn the_aws_sdk_reads_its_credentials(transport) {
        let program = "import boto3\n\
            credentials = boto3.Session().get_credentials()\n\
            frozen = credentials.get_frozen_credentials()\n\
            print('<sdk>' + ' '.join([credentials.method, frozen.access_key, frozen.secret_key, frozen.token]) + '</sdk>')\n";
        let role = json!({
            "Code": "Success", "Type": "AWS-HMAC", "LastUpdated": "2026-01-01T00:00:00Z",
            "AccessKeyId": "AKIDEXAMPLE", "SecretAccessKey": "secret/example", "Token": "session-token",
            "Expiration": "2199-01-01T00:00:00Z",
        });
        let contents = json!({
            "latest": {"meta-data": {"iam": {"security-credentials": {"tester": role.to_string()}}}}
        });
        let setup = Setup {
            transport,
            script: "export AWS_METADATA_SERVICE_TIMEOUT=20 AWS_METADATA_SERVICE_NUM_ATTEMPTS=2\nin_disk python3 /tmp/sdk.py 2>&1",
            disk: true,
            programs: &[("sdk.py", program)],
            mmds: json!({"network_interfaces": ["eth0"], "version": "V2", "imds_compat": true}),
            ..Setup::default()
        };
        let output = setup.output_of(&contents)?;
        assert_eq!(part(&output, "sdk"), "iam-role AKIDEXAMPLE secret/example session-token");
        Ok(())
    }

    /// The contents change under a guest that reads them all the time. Each response is consistent.
    fn a_guest_reads_patched_contents(transport) {
        let script = format!(
            "echo READING\n\
             while :; do\n\
             value=$(wget -q -O - {AT}/round) || {{ echo LOST; break; }}\n\
             [ \"$value\" = \"$last\" ] || {{ echo \"<saw$value>\"; last=$value; }}\n\
             [ \"$value\" = end ] && break\n\
             done\n\
             echo \"<all>$(wget -q -O - {AT}/ --header 'Accept: application/json')</all>\""
        );
        let (mut vmm, mut api) = Setup { transport, script: &script, ..Setup::default() }
            .start(&json!({"round": "begin", "gone": {"soon": "x"}}))?;
        vmm.wait_for_output("<sawbegin>", BOOT_TIMEOUT)?;
        for round in 0..10 {
            api.patch("/mmds", &json!({"round": round.to_string()}))?.ok()?;
            vmm.wait_for_output(&format!("<saw{round}>"), BOOT_TIMEOUT)?;
        }
        // Also across a pause.
        api.patch("/vm", &json!({"state": "Paused"}))?.ok()?;
        api.patch("/mmds", &json!({"round": "resumed"}))?.ok()?;
        api.patch("/vm", &json!({"state": "Resumed"}))?.ok()?;
        vmm.wait_for_output("<sawresumed>", BOOT_TIMEOUT)?;
        api.patch("/mmds", &json!({"round": "end", "gone": null}))?.ok()?;
        let output = output_of(&mut vmm)?;
        assert!(!output.contains("LOST"), "{output}");
        assert_eq!(part(&output, "all"), r#"{"round":"end"}"#);
        Ok(())
    }
}

/// cloud-init's data source reads it, with a token as on EC2.
#[test]
fn cloud_init_reads_its_ec2_data_source() -> Result<()> {
    let program = "import logging, sys\n\
        from cloudinit import helpers\n\
        from cloudinit.sources.DataSourceEc2 import DataSourceEc2\n\
        config = {'datasource': {'Ec2': {'metadata_urls': ['http://169.254.169.254']}}}\n\
        source = DataSourceEc2(config, None, helpers.Paths({}))\n\
        source._cloud_name = 'aws'\n\
        assert source.wait_for_metadata_service()\n\
        assert source._get_data()\n\
        print('<id>' + source.get_instance_id() + '</id>')\n\
        print('<keys>' + ' '.join(source.get_public_ssh_keys()) + '</keys>')\n\
        print('<macs>' + ' '.join(source.metadata['network']['interfaces']['macs']) + '</macs>')\n\
        print('<user>' + source.userdata_raw.decode() + '</user>')\n\
        print('<token>' + str(bool(source._api_token)) + '</token>')\n";
    let contents = json!({
        "2021-03-23": {
            "meta-data": {
                "instance-id": "i-cloudinit",
                "public-keys": {"0=my-key": "", "0": {"openssh-key": "ssh-ed25519 AAAA me"}},
                "network": {"interfaces": {"macs": {"06:00:00:00:00:01": {"device-number": "0"}}}},
            },
            "user-data": "#cloud-config\npackages: []",
            "dynamic": {"instance-identity": {"document": "{\"instanceId\":\"i-cloudinit\"}"}},
        }
    });
    let setup = Setup {
        script: "in_disk python3 /tmp/source.py 2>&1",
        disk: true,
        programs: &[("source.py", program)],
        mmds: json!({"network_interfaces": ["eth0"], "version": "V2"}),
        ..Setup::default()
    };
    let output = setup.output_of(&contents)?;
    assert_eq!(part(&output, "id"), "i-cloudinit");
    assert_eq!(part(&output, "macs"), "06:00:00:00:00:01");
    assert_eq!(part(&output, "user"), "#cloud-config\npackages: []");
    assert_eq!(part(&output, "token"), "True");
    Ok(())
}

/// As in flintlock's guests: the kernel command line names the data source, without a token, with
/// YAML in strings. The disk has no tool to search other disks for seeds.
#[test]
fn cloud_init_reads_its_no_cloud_data_source() -> Result<()> {
    let program = "from cloudinit import helpers\n\
        from cloudinit import util\n\
        from cloudinit.sources.DataSourceNoCloud import DataSourceNoCloudNet\n\
        util.find_devs_with = lambda *args, **more: []\n\
        paths = helpers.Paths({'cloud_dir': '/tmp/cloud', 'run_dir': '/tmp/run'})\n\
        source = DataSourceNoCloudNet({}, None, paths)\n\
        assert source._get_data()\n\
        print('<id>' + source.get_instance_id() + '</id>')\n\
        print('<name>' + source.metadata['local-hostname'] + '</name>')\n\
        print('<user>' + source.userdata_raw.decode() + '</user>')\n\
        print('<seed>' + str(source.seed) + '</seed>')\n";
    let contents = json!({"latest": {
        "meta-data": "instance-id: i-nocloud\nlocal-hostname: tester\n",
        "user-data": "#cloud-config\npackages: []",
    }});
    let setup = Setup {
        script: "in_disk python3 /tmp/source.py 2>&1",
        disk: true,
        programs: &[("source.py", program)],
        boot_args: "ds=nocloud-net;s=http://169.254.169.254/latest/",
        ..Setup::default()
    };
    let output = setup.output_of(&contents)?;
    assert_eq!(part(&output, "id"), "i-nocloud");
    assert_eq!(part(&output, "name"), "tester");
    assert_eq!(part(&output, "user"), "#cloud-config\npackages: []");
    assert!(part(&output, "seed").contains("http://169.254.169.254/latest/"), "{output}");
    Ok(())
}

/// Two interfaces reach the service.
#[test]
fn every_configured_interface_reaches_the_service() -> Result<()> {
    let script = format!(
        "ip link set eth1 up; ip addr add 192.168.78.2/24 dev eth1\n\
         ask() {{ echo \"<$1>$(wget -q -O - {AT}/a 2>&1)</$1>\"; }}\n\
         ask first\n\
         ip route del 169.254.169.254 dev eth0; ip route add 169.254.169.254 dev eth1\n\
         ask second"
    );
    let (mut vmm, mut api) =
        Setup { script: &script, ..Setup::default() }.configure(&json!({"a": "found"}))?;
    api.put("/network-interfaces/eth1", &interface("eth1"))?.ok()?;
    api.put("/mmds/config", &json!({"network_interfaces": ["eth0", "eth1"]}))?.ok()?;
    start(&mut api)?;
    let output = output_of(&mut vmm)?;
    assert_eq!((part(&output, "first"), part(&output, "second")), ("found".to_owned(), "found".to_owned()));
    Ok(())
}

/// One of two interfaces reaches the service, at its own address.
#[test]
fn other_interfaces_do_not_reach_the_service() -> Result<()> {
    let script = "ip link set eth1 up; ip addr add 192.168.78.2/24 dev eth1\n\
        ip route add 169.254.42.1 dev eth1\n\
        ask() { echo \"<$1>$(wget -q -O - http://169.254.42.1/a 2>&1)</$1>\"; }\n\
        ip route del 169.254.169.254 dev eth0\n\
        ask second\n\
        ip route del 169.254.42.1 dev eth1; ip route add 169.254.42.1 dev eth0\n\
        ask first";
    let mmds = json!({"network_interfaces": ["eth1"], "ipv4_address": "169.254.42.1"});
    let setup = Setup { script, ..Setup::default() };
    let (mut vmm, mut api) = setup.configure(&json!({"a": "found"}))?;
    let early = api.put("/mmds/config", &mmds)?;
    assert_eq!(early.status, 400);
    assert!(early.fault().contains("eth1"), "{early:?}");
    api.put("/network-interfaces/eth1", &interface("eth1"))?.ok()?;
    api.put("/mmds/config", &mmds)?.ok()?;
    start(&mut api)?;
    let output = output_of(&mut vmm)?;
    assert_eq!(part(&output, "second"), "found");
    assert!(!part(&output, "first").contains("found"), "{output}");
    Ok(())
}

/// As flintlock does: a configuration file, a metadata file and no API.
#[test]
fn the_service_works_from_configuration_and_metadata_files() -> Result<()> {
    let script =
        format!("{NETWORK}echo \"<id>$(wget -q -O - {AT}/latest/meta-data/ami-id)</id>\"\npoweroff -f");
    let builder = VmmBuilder::new(&vmm_path())?;
    let mut config = Guest::linux(Kernel::Tuned, &script, builder.dir())?.config();
    config["network-interfaces"] = json!([interface("eth0")]);
    config["mmds-config"] = json!({"version": "V1", "network_interfaces": ["eth0"]});
    let file = builder.dir().join("metadata.json");
    std::fs::write(&file, contents().to_string())?;
    let builder = builder.arg("--no-api").arg("--metadata").arg(&file).with_config(&config)?;
    let mut vmm = builder.spawn()?;
    assert_eq!(part(&output_of(&mut vmm)?, "id"), "ami-1234");
    Ok(())
}

/// The same for a guest without a network: its configuration file names no interface for the
/// service.
#[test]
fn a_configuration_file_can_name_no_interface() -> Result<()> {
    let builder = VmmBuilder::new(&vmm_path())?;
    let mut config = Guest::linux(Kernel::Tuned, "echo UP; poweroff -f", builder.dir())?.config();
    config["mmds-config"] = json!({"version": "V1"});
    let file = builder.dir().join("metadata.json");
    std::fs::write(&file, contents().to_string())?;
    let builder = builder.arg("--no-api").arg("--metadata").arg(&file).with_config(&config)?;
    let output = output_of(&mut builder.spawn()?)?;
    assert!(output.contains("UP"), "{output}");
    Ok(())
}

#[test]
fn an_unusable_metadata_file_ends_the_monitor() -> Result<()> {
    for (text, limit, named) in
        [("{", "100", "EOF"), ("[]", "100", "an array"), (r#"{"a":"long"}"#, "11", "at most 11")]
    {
        let builder = VmmBuilder::new(&vmm_path())?.with_api();
        let file = builder.dir().join("metadata.json");
        std::fs::write(&file, text)?;
        let builder = builder.arg("--metadata").arg(&file).arg("--mmds-size-limit").arg(limit);
        let (code, output) = builder.spawn()?.finish(TIMEOUT)?;
        assert_eq!(code, 152, "{output}");
        assert!(output.contains(named) && output.contains("metadata.json"), "{output}");
    }
    let (code, output) =
        VmmBuilder::new(&vmm_path())?.with_api().arg("--metadata=/nowhere").spawn()?.finish(TIMEOUT)?;
    assert!(code == 152 && output.contains("/nowhere"), "{output}");
    Ok(())
}

/// Statuses and messages, before and after the start.
#[test]
fn the_api_names_unsupported_settings() -> Result<()> {
    let setup =
        Setup { script: "echo UP; sleep 1000", args: &["--mmds-size-limit", "50"], ..Setup::default() };
    let (vmm, mut api) = setup.configure(&json!({"a": "1"}))?;
    assert_eq!(api.get("/mmds")?.ok()?.json()?, json!({"a": "1"}));
    let v1 = api.put("/mmds/config", &json!({"network_interfaces": ["eth0"]}))?.ok()?;
    assert_eq!(v1.header("Deprecation"), Some("true"));
    let v2 = api.put("/mmds/config", &json!({"network_interfaces": ["eth0"], "version": "V2"}))?.ok()?;
    assert_eq!((v2.status, v2.header("Deprecation")), (204, None));
    for (method, path, body, status, named) in [
        ("PUT", "/mmds", r#"{"a":"0123456789012345678901234567890123456789012345"}"#, 413, "at most 50"),
        ("PATCH", "/mmds", r#"{"b":"0123456789012345678901234567890123456789"}"#, 413, "at most 50"),
        ("PUT", "/mmds", "[1]", 400, "an array"),
        ("PATCH", "/mmds", "7", 400, "a number"),
        ("PUT", "/mmds", "{", 400, "EOF"),
        ("PUT", "/mmds/config", r#"{"network_interfaces":[]}"#, 400, "network_interfaces is empty"),
        ("PUT", "/mmds/config", r#"{"network_interfaces":["eth7"]}"#, 400, "eth7"),
        (
            "PUT",
            "/mmds/config",
            r#"{"network_interfaces":["eth0"],"ipv4_address":"10.0.0.1"}"#,
            400,
            "10.0.0.1",
        ),
        ("PUT", "/mmds/config", r#"{"network_interfaces":["eth0"],"color":1}"#, 400, "color"),
        ("PUT", "/mmds/config", r#"{"version":"V2"}"#, 400, "network_interfaces"),
    ] {
        let answer = api.request(method, path, Some(body))?;
        assert_eq!(answer.status, status, "{method} {path} {body}: {answer:?}");
        assert!(answer.fault().contains(named), "{method} {path} {body}: {answer:?}");
    }
    let shown = api.get("/vm/config")?.ok()?.json()?;
    assert_eq!(shown["mmds-config"]["version"], "V2");
    start(&mut api)?;
    vmm.wait_for_output("UP", BOOT_TIMEOUT)?;
    let late = api.put("/mmds/config", &json!({"network_interfaces": ["eth0"]}))?;
    assert!(
        late.status == 400 && late.fault().contains("not supported after starting the microVM"),
        "{late:?}"
    );
    api.patch("/mmds", &json!({"a": null, "b": "2"}))?.ok()?;
    assert_eq!(api.get("/mmds")?.ok()?.json()?, json!({"b": "2"}));
    Ok(())
}

/// Contents that no interface reaches are refused once that cannot change.
#[test]
fn a_guest_without_an_interface_for_it_has_no_contents() -> Result<()> {
    let builder = VmmBuilder::new(&vmm_path())?.with_api();
    let guest = Guest::linux(Kernel::Tuned, "echo UP; sleep 1000", builder.dir())?;
    let vmm = builder.spawn()?;
    let mut api = vmm.ready_client(TIMEOUT)?;
    let early = api.patch("/mmds", &json!({"a": "1"}))?;
    assert!(early.status == 400 && early.fault().contains("not initialized"), "{early:?}");
    assert_eq!(api.get("/mmds")?.ok()?.json()?, json!({}));
    api.put("/mmds", &json!({"a": "1"}))?.ok()?;
    guest.put(&mut api)?;
    start(&mut api)?;
    for (method, body) in [("GET", None), ("PUT", Some("{}")), ("PATCH", Some("{}"))] {
        let answer = api.request(method, "/mmds", body)?;
        assert!(answer.status == 400 && answer.fault().contains("cannot reach MMDS"), "{answer:?}");
    }
    let child = api.put("/fork", &json!({"children": [{"id": "c", "mmds": {"a": "2"}}]}))?;
    assert!(
        child.status == 400 && child.fault().contains("child c: the guest cannot reach MMDS"),
        "{child:?}"
    );
    Ok(())
}

/// Each side of a fork reads the contents that its own user sets after the fork.
#[test]
fn a_forked_child_reads_its_own_contents() -> Result<()> {
    let net = HostNet::new()?;
    for tap in ["vesta-own", "vesta-same"] {
        net.tap(tap, "", "")?;
    }
    let script = format!(
        "while :; do\n\
         value=$(wget -q -O - {AT}/round 2>/dev/null) || continue\n\
         [ \"$value\" = \"$last\" ] || {{ echo \"<saw$value>\"; last=$value; }}\n\
         [ \"$value\" = end ] && break\n\
         done; echo LAST"
    );
    let (mut vmm, mut api) =
        Setup { script: &script, ..Setup::default() }.start(&json!({"round": "begin", "same": "1"}))?;
    vmm.wait_for_output("<sawbegin>", BOOT_TIMEOUT)?;
    let home = tempfile::tempdir()?;
    let path = |name: &str| home.path().join(name);
    let child = |id: &str, more: Value| {
        let mut child = json!({
            "id": id, "api_socket": path(id), "serial": {"serial_out_path": path(&format!("{id}.serial"))},
            "network_overrides": [{"iface_id": "eth0", "host_dev_name": format!("vesta-{id}")}],
        });
        if !more.is_null() {
            child["mmds"] = more;
        }
        child
    };
    let children = [child("own", json!({"round": "own"})), child("same", Value::Null)];
    let reply = api.put("/fork", &json!({"children": children}))?.ok()?.json()?;
    let orphans = Orphans::of_fork(&reply)?;
    wait_for_text(&path("own.serial"), "<sawown>", BOOT_TIMEOUT)?;
    // Each has its own contents, and none of the others'.
    let mut clients = ["own", "same"].map(|id| ApiClient::new(&path(id)));
    assert_eq!(clients[0].get("/mmds")?.ok()?.json()?, json!({"round": "own"}));
    assert_eq!(clients[1].get("/mmds")?.ok()?.json()?, json!({"round": "begin", "same": "1"}));
    api.patch("/mmds", &json!({"round": "parent"}))?.ok()?;
    clients[1].patch("/mmds", &json!({"round": "changed"}))?.ok()?;
    vmm.wait_for_output("<sawparent>", BOOT_TIMEOUT)?;
    wait_for_text(&path("same.serial"), "<sawchanged>", BOOT_TIMEOUT)?;
    for api in clients.iter_mut().chain([&mut api]) {
        api.patch("/mmds", &json!({"round": "end"}))?.ok()?;
    }
    let parent = output_of(&mut vmm)?;
    assert!(!parent.contains("<sawown>") && !parent.contains("<sawchanged>"), "{parent}");
    for (id, others) in [("own", ["<sawparent>", "<sawchanged>"]), ("same", ["<sawparent>", "<sawown>"])] {
        let output = wait_for_text(&path(&format!("{id}.serial")), "LAST", BOOT_TIMEOUT)?;
        assert!(others.iter().all(|other| !output.contains(other)), "{id}: {output}");
    }
    orphans.wait(TIMEOUT)
}

/// An interface whose frames the monitor does not see, or not all of them, is refused when it is
/// configured.
#[test]
fn an_unsuitable_interface_is_refused() -> Result<()> {
    let (_vmm, mut api) = Setup::default().configure(&json!({}))?;
    let mut several = interface("eth0");
    several["num_queues"] = json!(2);
    let refused = api.put("/network-interfaces/eth0", &several)?;
    assert!(refused.status == 400 && refused.fault().contains("num_queues 2"), "{refused:?}");
    // A configuration file is checked before any file that it names is opened.
    let mut vhost = interface("eth0");
    vhost["backend"] = json!("vhost");
    let config = json!({
        "boot-source": {"kernel_image_path": "/nowhere"},
        "network-interfaces": [vhost],
        "mmds-config": {"network_interfaces": ["eth0"]},
    });
    let (code, output) =
        VmmBuilder::new(&vmm_path())?.arg("--no-api").with_config(&config)?.spawn()?.finish(TIMEOUT)?;
    assert!(code == 152 && output.contains("has the backend vhost"), "{output}");
    Ok(())
}

/// A snapshot has the configuration of the service and none of its contents: the user of the
/// restored guest sets them.
#[test]
fn a_restored_guest_reads_contents_of_its_new_monitor() -> Result<()> {
    // A load uses an existing tap and creates none.
    HostNet::new()?.tap("vesta-eth0", "", "")?;
    let script = format!(
        "while :; do\n\
         value=$(wget -q -O - {AT}/round 2>/dev/null) || continue\n\
         [ \"$value\" = \"$last\" ] || {{ echo \"<saw$value>\"; last=$value; }}\n\
         [ \"$value\" = end ] && break\n\
         done"
    );
    let files = tempfile::tempdir()?;
    let (state, memory) = (files.path().join("state"), files.path().join("memory"));
    let (vmm, mut api) = Setup { script: &script, ..Setup::default() }.start(&json!({"round": "begin"}))?;
    vmm.wait_for_output("<sawbegin>", BOOT_TIMEOUT)?;
    api.patch("/vm", &json!({"state": "Paused"}))?.ok()?;
    api.put("/snapshot/create", &json!({"snapshot_path": state, "mem_file_path": memory}))?.ok()?;
    drop(vmm);

    let mut vmm = VmmBuilder::new(&vmm_path())?.with_api().spawn()?;
    let mut api = vmm.ready_client(TIMEOUT)?;
    api.put("/mmds", &json!({"round": "restored"}))?.ok()?;
    let load = json!({
        "snapshot_path": state, "resume_vm": true,
        "mem_backend": {"backend_type": "File", "backend_path": memory},
    });
    api.put("/snapshot/load", &load)?.ok()?;
    vmm.wait_for_output("<sawrestored>", BOOT_TIMEOUT)?;
    assert_eq!(api.get("/vm/config")?.ok()?.json()?["mmds-config"]["network_interfaces"], json!(["eth0"]));
    api.patch("/mmds", &json!({"round": "end"}))?.ok()?;
    let output = output_of(&mut vmm)?;
    assert!(!output.contains("<sawbegin>") && output.contains("<sawend>"), "{output}");
    Ok(())
}
