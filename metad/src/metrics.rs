//! Figures for Prometheus, gathered when they are asked for.

use std::{fmt, sync::atomic::AtomicU64, time::Duration};

use prometheus_client::{
    encoding::{EncodeLabelSet, text::encode},
    metrics::{
        counter::Counter,
        family::Family,
        gauge::Gauge,
        histogram::{Histogram, exponential_buckets},
    },
    registry::{Registry, Unit},
};
use tonic::Code;

use crate::{engine::Engine, error::Error};

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Call {
    method: &'static str,
    code: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Method {
    method: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Book {
    book: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DonorBook {
    donor: String,
    book: &'static str,
}

/// All metrics of one daemon.
pub(crate) struct Metrics {
    registry: Registry,
    calls: Family<Call, Counter>,
    seconds: Family<Method, Histogram>,
    space: Family<Book, Gauge>,
    donors: Family<DonorBook, Gauge>,
    /// Reads from the pool over all reads, as far as metad hears of them.
    hit_ratio: Gauge<f64, AtomicU64>,
    gauges: Vec<(Figure, Gauge)>,
    evictions: Gauge<u64, AtomicU64>,
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Metrics").finish_non_exhaustive()
    }
}

#[derive(Clone, Copy, Debug)]
enum Figure {
    Lent,
    Images,
    Layers,
    Objects,
    Packs,
    Logical,
    Pulls,
    Nodes,
    DonorsLive,
    Database,
    ReplicasWanted,
    ReplicasMissing,
    PacksShort,
    PacksLost,
    CopiesRunning,
    CopiesDone,
    CopiesFailed,
    CopiedBytes,
    MovedBytes,
    Rebalancing,
    PoolReads,
    PoolMisses,
}

const FIGURES: &[(Figure, &str, &str)] = &[
    (Figure::Lent, "lent_bytes", "Memory that donors lend"),
    (Figure::Images, "images", "Named images"),
    (Figure::Layers, "layers", "Layers"),
    (Figure::Objects, "objects", "Objects of visible packs"),
    (
        Figure::Packs,
        "packs",
        "Packs that layers and images refer to",
    ),
    (
        Figure::Logical,
        "logical_bytes",
        "What all layers would take apart",
    ),
    (Figure::Pulls, "pulls", "Pulls under way"),
    (Figure::Nodes, "nodes", "Nodes with a lease"),
    (Figure::DonorsLive, "donors_live", "Donors with a lease"),
    (
        Figure::Database,
        "database_bytes",
        "Database and journal on disk",
    ),
    (
        Figure::ReplicasWanted,
        "replicas_wanted",
        "Replicas that images want of their packs",
    ),
    (
        Figure::ReplicasMissing,
        "replicas_missing",
        "Replicas that images want and do not have",
    ),
    (
        Figure::PacksShort,
        "packs_short",
        "Packs with a replica and fewer than wanted",
    ),
    (
        Figure::PacksLost,
        "packs_lost",
        "Packs with no replica, which a refill would bring back",
    ),
    (
        Figure::CopiesRunning,
        "copies_running",
        "Copies that donors are to make now",
    ),
    (
        Figure::CopiesDone,
        "copies_done",
        "Copies made since the start",
    ),
    (
        Figure::CopiesFailed,
        "copies_failed",
        "Copies that failed since the start",
    ),
    (
        Figure::CopiedBytes,
        "copied_bytes",
        "Bytes copied between donors since the start",
    ),
    (
        Figure::MovedBytes,
        "moved_bytes",
        "Part of the copied bytes that moved to even the load",
    ),
    (
        Figure::Rebalancing,
        "rebalancing",
        "1 while packs move to even the load",
    ),
    (
        Figure::PoolReads,
        "pool_reads",
        "Reads of packs that nodes reported since the start",
    ),
    (
        Figure::PoolMisses,
        "pool_misses",
        "Packs asked for since the start that had no replica",
    ),
];

impl Metrics {
    pub(crate) fn new() -> Self {
        let mut registry = Registry::with_prefix("harbour_metad");
        let calls = Family::<Call, Counter>::default();
        registry.register("rpc", "Calls by method and code", calls.clone());
        let buckets = || Histogram::new(exponential_buckets(0.0001, 2.5, 14));
        let seconds = Family::<Method, Histogram>::new_with_constructor(buckets);
        registry.register_with_unit("rpc", "Time to answer", Unit::Seconds, seconds.clone());
        let space = Family::<Book, Gauge>::default();
        registry.register_with_unit("space", "Lent memory by book", Unit::Bytes, space.clone());
        let donors = Family::<DonorBook, Gauge>::default();
        registry.register_with_unit(
            "donor",
            "Memory of each donor by book",
            Unit::Bytes,
            donors.clone(),
        );
        let hit_ratio = Gauge::default();
        registry.register(
            "pool_hit_ratio",
            "Reads of packs over those and the packs that had no replica; 1 before the first",
            hit_ratio.clone(),
        );
        let mut gauges = Vec::new();
        for (figure, name, help) in FIGURES {
            let gauge = Gauge::default();
            registry.register(*name, *help, gauge.clone());
            gauges.push((*figure, gauge));
        }
        let evictions = Gauge::default();
        registry.register(
            "evictions",
            "Packs evicted since the state directory was made",
            evictions.clone(),
        );
        Self {
            registry,
            calls,
            seconds,
            space,
            donors,
            hit_ratio,
            gauges,
            evictions,
        }
    }

    /// A call was answered.
    pub(crate) fn answered(&self, method: &'static str, code: Code, time: Duration) {
        self.calls
            .get_or_create(&Call {
                method,
                code: code_name(code),
            })
            .inc();
        self.seconds
            .get_or_create(&Method { method })
            .observe(time.as_secs_f64());
    }

    /// All figures as Prometheus reads them.
    pub(crate) fn text(&self, engine: &Engine) -> Result<String, Error> {
        let status = engine.status()?;
        let list = engine.list_donors()?;
        let count = |count: usize| count as u64;
        // All space is of one instant, so that books and donors add up.
        let taken = [list.used_bytes, list.reserved_bytes, list.quarantined_bytes];
        let free = list.lent_bytes.saturating_sub(taken.iter().sum());
        for (book, bytes) in ["used", "reserved", "quarantined", "free"]
            .into_iter()
            .zip(taken.into_iter().chain([free]))
        {
            self.space.get_or_create(&Book { book }).set(bytes as i64);
        }
        for (figure, gauge) in &self.gauges {
            let value = match figure {
                Figure::Lent => list.lent_bytes,
                Figure::Images => u64::from(status.images),
                Figure::Layers => u64::from(status.layers),
                Figure::Objects => status.objects,
                Figure::Packs => status.packs,
                Figure::Logical => status.logical_bytes,
                Figure::Pulls => count(status.pulls.len()),
                Figure::Nodes => count(status.nodes.len()),
                Figure::DonorsLive => count(engine.live_donors()),
                Figure::Database => status.database_bytes,
                Figure::ReplicasWanted => status.replicas_wanted,
                Figure::ReplicasMissing => status.replicas_missing,
                Figure::PacksShort => status.packs_short,
                Figure::PacksLost => status.packs_lost,
                Figure::CopiesRunning => u64::from(status.copies_running),
                Figure::CopiesDone => status.copies_done,
                Figure::CopiesFailed => status.copies_failed,
                Figure::CopiedBytes => status.copied_bytes,
                Figure::MovedBytes => status.moved_bytes,
                Figure::Rebalancing => u64::from(status.rebalancing),
                Figure::PoolReads => status.pool_reads,
                Figure::PoolMisses => status.pool_misses,
            };
            gauge.set(value as i64);
        }
        self.evictions.set(status.evictions);
        let asked = status.pool_reads + status.pool_misses;
        let ratio = if asked == 0 {
            1.0
        } else {
            status.pool_reads as f64 / asked as f64
        };
        self.hit_ratio.set(ratio);
        // Those that left are not shown any more.
        self.donors.clear();
        for donor in list.donors {
            for (book, bytes) in [("used", donor.used_bytes), ("free", donor.free_bytes)] {
                let label = DonorBook {
                    donor: donor.name.clone(),
                    book,
                };
                self.donors.get_or_create(&label).set(bytes as i64);
            }
        }
        let mut text = String::new();
        // Writing to a string does not fail.
        let _ = encode(&mut text, &self.registry);
        Ok(text)
    }
}

fn code_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}
