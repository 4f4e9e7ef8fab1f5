//! A cluster over the link: metad and a node on the near side, a donor on the far one, and a file
//! that is read through the mount.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::Context as _;

use super::FAR;
use crate::{Common, command::Daemon, data::Data, harbour, mounts, sandbox::Place};

/// Longest wait for a daemon.
const READY: Duration = Duration::from_secs(30);
/// Where the donor listens.
const PORT: u16 = 7481;
/// Room beside the content.
const SPARE_BYTES: u64 = 256 << 20;

/// The daemons, those that need others first: they end in this order.
pub(super) struct Cluster {
    /// The large file.
    pub(super) file: PathBuf,
    /// Its length in bytes.
    pub(super) len: u64,
    _node: Daemon,
    _donor: Daemon,
    _metad: Daemon,
}

impl Cluster {
    /// Starts one whose donor is in the network namespace of the process `far`, and pulls the image
    /// of the large file.
    pub(super) fn start(common: &Common, place: &Place, far: u32) -> anyhow::Result<Self> {
        let data = Data::load(&common.data)?;
        let image = data.image("big")?;
        let at = |part: &str| place.short.join(format!("l-{part}"));
        let socket = at("metad").join("metad.sock");
        let command = |part: &str, namespace: Option<u32>| -> anyhow::Result<Command> {
            let mut command = match namespace {
                Some(pid) => {
                    let mut command = Command::new("nsenter");
                    command.arg(format!("--net=/proc/{pid}/ns/net")).arg("--");
                    command.arg(&common.harbour);
                    command
                }
                None => Command::new(&common.harbour),
            };
            for dir in [
                at(part),
                at("mount"),
                place.work.join(format!("state-{part}")),
            ] {
                fs::create_dir_all(&dir).with_context(|| format!("cannot create {dir:?}"))?;
            }
            command.arg(part).arg("--run-dir").arg(at(part));
            command.arg("--mount").arg(at("mount"));
            command
                .arg("--state-dir")
                .arg(place.work.join(format!("state-{part}")));
            command.env_remove("HARBOUR_CONFIG");
            if part != "metad" {
                command.args(["--metad", &format!("unix:{}", socket.display())]);
            }
            Ok(command)
        };
        let log = |part: &str| place.work.join(format!("link-{part}.log"));
        let mut metad = Daemon::start(&mut command("metad", None)?, &log("metad"))?;
        metad.wait_ready(READY, || socket.exists())?;
        let lend = (image.unpacked_bytes + SPARE_BYTES).next_multiple_of(16 << 20);
        let mut donor = command("donor", Some(far))?;
        donor.args(["--lend", &lend.to_string(), "--on-stop", "drop"]);
        donor.args(["--listen", &format!("{FAR}:{PORT}")]);
        let mut donor = Daemon::start(&mut donor, &log("donor"))?;
        let known = || {
            let mut list = match command("donors", None) {
                Ok(list) => list,
                Err(_) => return false,
            };
            let text = crate::command::run(list.arg("--json")).unwrap_or_default();
            let donors: serde_json::Value = serde_json::from_slice(&text).unwrap_or_default();
            donors[0]["live"] == true
        };
        donor.wait_ready(READY, known)?;
        let source = format!("oci:{}:big", common.data.join("oci").display());
        crate::command::run(command("pull", None)?.args(["--progress", "none", &source]))?;
        let mut node = command("node", None)?;
        node.args(["--transport", "tcp", "--fast-view", "off"]);
        let mut node = Daemon::start(&mut node, &log("node"))?;
        let mount = at("mount");
        let find = |mount: &Path| harbour::root_below(mount, &image.manifest);
        node.wait_ready(READY, || {
            mounts::is_mount_point(&mount) && find(&mount).is_ok()
        })?;
        Ok(Self {
            file: find(&mount)?.join("big.bin"),
            len: data.big_bytes,
            _node: node,
            _donor: donor,
            _metad: metad,
        })
    }
}
