//! What a snapshotter did, counted.

use std::sync::atomic::{AtomicU64, Ordering};

use serde_json::json;

/// Why a layer was left to containerd to fetch and unpack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// The pool does not have it, and nothing says from which image to pull it.
    Unknown,
    /// Pulling it into the pool failed, or took too long.
    Pull,
    /// The mount of this host does not show it.
    Mount,
    /// metad has not been heard of.
    Metad,
}

const WHYS: [(Why, &str); 4] = [
    (Why::Unknown, "not-in-pool"),
    (Why::Pull, "pull-failed"),
    (Why::Mount, "mount-down"),
    (Why::Metad, "metad-down"),
];

/// Counters, all since the start.
#[derive(Debug, Default)]
pub struct Figures {
    /// Layers that containerd did not have to fetch.
    shared: AtomicU64,
    fallbacks: [AtomicU64; WHYS.len()],
    pulls: AtomicU64,
    failed_pulls: AtomicU64,
}

impl Figures {
    /// A layer was there.
    pub fn shared(&self) {
        self.shared.fetch_add(1, Ordering::Relaxed);
    }

    /// A layer was left to containerd.
    pub fn fallback(&self, why: Why) {
        let at = WHYS.iter().position(|(known, _)| *known == why);
        if let Some(counter) = at.and_then(|at| self.fallbacks.get(at)) {
            counter.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// An image was pulled for containerd, or could not be.
    pub fn pull(&self, well: bool) {
        let counter = if well {
            &self.pulls
        } else {
            &self.failed_pulls
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }

    fn counts(&self) -> impl Iterator<Item = (&'static str, u64)> {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        WHYS.iter()
            .zip(&self.fallbacks)
            .map(move |((_, name), counter)| (*name, load(counter)))
    }

    /// For people's page: `snapshotter.json` in the run directory.
    pub fn page(&self, snapshots: usize, shared: usize) -> serde_json::Value {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        json!({
            "snapshots": snapshots, "snapshots_of_layers": shared,
            "layers_shared": load(&self.shared),
            "fallbacks": self.counts().collect::<std::collections::BTreeMap<_, _>>(),
            "pulls": load(&self.pulls), "failed_pulls": load(&self.failed_pulls),
        })
    }

    /// For Prometheus, in its text format.
    pub fn text(&self, snapshots: usize, shared: usize) -> String {
        use std::fmt::Write as _;
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let mut text = String::new();
        let mut family = |name: &str, kind: &str, help: &str, samples: &[(String, u64)]| {
            let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
            for (labels, value) in samples {
                let _ = writeln!(text, "{name}{labels} {value}");
            }
        };
        let one = |value: u64| vec![(String::new(), value)];
        let reason = |(name, value)| (format!("{{reason=\"{name}\"}}"), value);
        let fallbacks: Vec<_> = self.counts().map(reason).collect();
        let pulls = [
            ("{outcome=\"ok\"}".to_owned(), load(&self.pulls)),
            ("{outcome=\"failed\"}".to_owned(), load(&self.failed_pulls)),
        ];
        family(
            "harbour_snapshotter_layers_shared_total",
            "counter",
            "Layers that containerd did not have to fetch or unpack.",
            &one(load(&self.shared)),
        );
        family(
            "harbour_snapshotter_fallbacks_total",
            "counter",
            "Layers that were left to containerd to fetch and unpack.",
            &fallbacks,
        );
        family(
            "harbour_snapshotter_pulls_total",
            "counter",
            "Images pulled into the pool because containerd wanted them.",
            &pulls,
        );
        family(
            "harbour_snapshotter_snapshots",
            "gauge",
            "Snapshots there are.",
            &one(snapshots as u64),
        );
        family(
            "harbour_snapshotter_layer_snapshots",
            "gauge",
            "Snapshots that are layers of the mount and take nothing of the disk.",
            &one(shared as u64),
        );
        text
    }
}
