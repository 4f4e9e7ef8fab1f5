//! The cluster that is kept from run to run: metad on one host, donors on three, a mount on a host
//! that lends nothing, a registry on yet another one.

use std::{path::PathBuf, time::Duration};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::{
    group::{Group, Pen},
    image::{self, Content},
    plan::{DONORS, Fault, Plan},
};
use crate::{
    cluster::{Part, Pulled, short},
    hosts::{Family, Hosts},
    shell,
};

/// Host of metad.
const METAD: usize = 0;
/// Host of the mount.
pub(super) const NODE: usize = DONORS + 1;
/// Host of the registry.
pub(super) const REGISTRY: usize = DONORS + 2;
/// Memory lent by each donor.
const LEND: &str = "96MiB";
/// What a donor's host keeps; more than a donor lends, so that any part can be asked for.
pub(super) const KEEP_FREE_MIB: u64 = 128;
/// metad looks at all packs once a second at most: what it says of them is no older than this.
const LOOK: Duration = Duration::from_millis(1_500);
/// Until every pack has its replicas again.
const WHOLE_LIMIT: Duration = Duration::from_secs(60);

/// What is kept.
#[derive(Debug)]
pub(super) struct Stage {
    /// The hosts.
    pub(super) hosts: Hosts,
    /// What the image holds.
    pub(super) content: Content,
    /// The image's root as the hosts see it.
    pub(super) root: PathBuf,
    /// Its layers as lower directories, the topmost first.
    pub(super) lower: Vec<PathBuf>,
    /// Its fast view, where there is one.
    pub(super) view: Option<PathBuf>,
    /// Where the container lives.
    pub(super) pen: Pen,
    reference: String,
    /// Of each donor, from host 1 on.
    groups: Vec<Group>,
}

/// Numbers of the mount since it was made.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Numbers {
    /// Bytes from donors.
    pub(super) donors: u64,
    /// Bytes that came from the registry.
    pub(super) registry: u64,
    /// Stretches whose digests were wrong.
    pub(super) wrong: u64,
    /// Reads for which a second donor was asked.
    pub(super) hedges: u64,
    /// Refills that reads waited for.
    pub(super) refills: u64,
    /// Operations that failed.
    pub(super) failed: u64,
}

impl Stage {
    /// Starts all of it and pulls the image.
    pub(super) fn set() -> Result<Self> {
        let hosts = Hosts::new(REGISTRY + 1, Family::V4)?;
        let registry = hosts.registry(REGISTRY);
        hosts.configure(&format!("[registry.\"{registry}\"]\ninsecure = true\n"))?;
        let (layout, content) = image::make(hosts.dir())?;
        let reference = format!("{registry}/faults:1");
        hosts.serve_image(REGISTRY, &layout.reference(image::TAG), "faults:1")?;
        hosts.start(METAD, Part::Metad, &["--replicas", "2"])?;
        let groups = (1..=DONORS).map(Group::make).collect::<Result<Vec<_>>>()?;
        let mut stage = Self {
            hosts,
            content,
            root: PathBuf::new(),
            lower: Vec::new(),
            view: None,
            pen: Pen::choose()?,
            reference,
            groups,
        };
        for host in 1..=DONORS {
            stage.start_donor(host)?;
        }
        stage.hosts.wait_donors(DONORS)?;
        stage.hosts.start(NODE, Part::Node, &[])?;
        stage.hosts.wait_node(NODE)?;
        let pulled = stage.hosts.pull(NODE, &stage.reference)?;
        stage.look_around(&pulled)?;
        stage.wait_whole()?;
        Ok(stage)
    }

    fn look_around(&mut self, pulled: &Pulled) -> Result<()> {
        self.root = self.hosts.rootfs(NODE, pulled)?;
        let above = self.root.parent().context("an image has a directory")?;
        for number in (0..pulled.layers).rev() {
            // A registry's name has a colon, which parts lower directories: so not by the image.
            let link = self.hosts.seen(&above.join(format!("layers/{number}")));
            let to = std::fs::read_link(&link).with_context(|| link.display().to_string())?;
            let name = to.file_name().context("a layer has a name")?;
            let lower = self.hosts.host_dir(NODE).join("mnt/layers").join(name);
            ensure!(self.hosts.seen(&lower).is_dir(), "no {}", lower.display());
            self.lower.push(lower);
        }
        let view = self.hosts.host_dir(NODE).join("run/view");
        let view = view.join(short(&pulled.manifest));
        self.view = self.hosts.seen(&view.join("fio")).is_dir().then_some(view);
        Ok(())
    }

    /// Starts the donor of a host.
    pub(super) fn start_donor(&self, host: usize) -> Result<()> {
        let keep = format!("{KEEP_FREE_MIB}MiB");
        let flags = [
            "--lend",
            LEND,
            "--huge-pages",
            "never",
            "--keep-free",
            &keep,
            "--on-stop",
            "drop",
        ];
        let group = self.group(host)?.processes();
        self.hosts.start_in(host, Part::Donor, &flags, Some(&group))
    }

    /// The cgroup of a donor.
    pub(super) fn group(&self, host: usize) -> Result<&Group> {
        let place = host.checked_sub(1).and_then(|place| self.groups.get(place));
        place.with_context(|| format!("no donor on host {host}"))
    }

    /// Puts right what a plan broke, and waits until every pack has its replicas.
    pub(super) fn mend(&self, plan: &Plan) -> Result<()> {
        self.hosts.plug(REGISTRY, true)?;
        let lost: Vec<&Fault> = plan.faults.iter().filter(|f| f.kind.loses()).collect();
        for fault in &lost {
            if self.hosts.pid(fault.host, Part::Donor).is_ok() {
                self.hosts.signal(fault.host, Part::Donor, "KILL")?;
                self.wait_gone(fault.host)?;
            }
            self.start_donor(fault.host)?;
        }
        self.hosts.wait_donors(DONORS)?;
        self.wait_whole()
    }

    fn wait_gone(&self, host: usize) -> Result<()> {
        shell::until("a killed donor is gone", WHOLE_LIMIT, || {
            Ok(self.hosts.pid(host, Part::Donor).is_err().then_some(()))
        })
    }

    /// Starts the mount anew, so that nothing is left of what it read from the registry.
    pub(super) fn renew_mount(&self) -> Result<()> {
        self.hosts.signal(NODE, Part::Node, "TERM")?;
        shell::until("the mount has ended", WHOLE_LIMIT, || {
            Ok(self.hosts.pid(NODE, Part::Node).is_err().then_some(()))
        })
        .with_context(|| self.hosts.logs())?;
        self.hosts.start(NODE, Part::Node, &[])?;
        self.hosts.wait_node(NODE)?;
        shell::until("the mount shows the image", WHOLE_LIMIT, || {
            let shown = [Some(&self.root), self.view.as_ref()];
            let shown = shown.into_iter().flatten();
            let there = |path: &PathBuf| self.hosts.seen(&path.join("fio")).is_dir();
            Ok(shown.into_iter().all(there).then_some(()))
        })
        .with_context(|| self.hosts.logs())
    }

    fn replicas(&self) -> Result<Value> {
        Ok(self.hosts.json(METAD, "status")?["metad"]["replicas"].clone())
    }

    fn wait_whole(&self) -> Result<()> {
        std::thread::sleep(LOOK);
        let mut now = Value::Null;
        let whole = shell::until("every pack has its replicas", WHOLE_LIMIT, || {
            now = self.replicas()?;
            let wanted = now["wanted"].as_u64() > Some(0);
            let quiet = now["copies_running"] == 0 && now["rebalancing"] == false;
            // What nobody reads stays lost until it is pulled again; what a donor had that was started
            // anew is known to be lost only when that one has registered.
            if now["packs_lost"] != 0 {
                self.hosts.pull(NODE, &self.reference)?;
            }
            Ok((wanted && quiet && now["missing"] == 0).then_some(()))
        });
        whole.with_context(|| format!("{now}\n{}", self.hosts.logs()))
    }

    /// What the mount has counted.
    pub(super) fn numbers(&self) -> Result<Numbers> {
        let page = self.hosts.host_dir(NODE).join("mnt/.status/status.json");
        let text = std::fs::read(self.hosts.seen(&page))?;
        let page: Value = serde_json::from_slice(&text)?;
        let number = |value: &Value| value.as_u64().context("not a number");
        let bytes = page["pool_bytes"].as_object().context("no bytes")?;
        let registry = bytes.get("source").and_then(Value::as_u64).unwrap_or(0);
        Ok(Numbers {
            donors: bytes.values().filter_map(Value::as_u64).sum::<u64>() - registry,
            registry,
            wrong: number(&page["wrong"])?,
            hedges: number(&page["hedges"])?,
            refills: number(&page["refills"])?,
            failed: number(&page["failed"])?,
        })
    }
}

impl Numbers {
    /// What came since `before`.
    pub(super) fn since(self, before: Self) -> Self {
        Self {
            donors: self.donors.saturating_sub(before.donors),
            registry: self.registry.saturating_sub(before.registry),
            wrong: self.wrong.saturating_sub(before.wrong),
            hedges: self.hedges.saturating_sub(before.hedges),
            refills: self.refills.saturating_sub(before.refills),
            failed: self.failed.saturating_sub(before.failed),
        }
    }
}
