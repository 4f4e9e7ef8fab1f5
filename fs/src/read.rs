//! The read path: from a range of a view's EROFS file to checked bytes.
//!
//! A range becomes segments (by the index), segments become stretches of packs on granule borders
//! ([`plan`]), stretches are fetched and checked ([`fetch`]) straight into the memory that the
//! reply is sent from. Only a granule of which the range takes a part goes through memory of its
//! own, and is kept for a while, as its other parts are often read next ([`edges`]).

mod edges;
mod fetch;
mod locations;
pub(crate) mod pace;
mod plan;

use std::{
    ops::{Deref, Range},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use harbour_image::object::verify_granule;

pub(crate) use self::fetch::{Errand, Missed, Want};
use self::{edges::Edges, fetch::Hedging, locations::Locations, plan::Plan};
use crate::{
    buffers::{Buffer, Buffers},
    config::Config,
    error::{Error, Result},
    source::{Catalogue, Pool, Refill},
    stats::{Stats, Uses},
    view::{Opened, View},
};

/// Everything outside of the file system, and what is remembered about it.
pub(crate) struct Outside {
    pub(crate) config: Config,
    pub(crate) catalogue: Arc<dyn Catalogue>,
    pub(crate) pool: Arc<dyn Pool>,
    pub(crate) refill: Arc<dyn Refill>,
    pub(crate) locations: Locations,
    pub(crate) edges: Edges,
    pub(crate) buffers: Arc<Buffers>,
    pub(crate) stats: Stats,
    pub(crate) uses: Uses,
    pub(crate) hedging: Hedging,
    /// Spreads reads over replicas between which nothing else decides.
    pub(crate) spread: AtomicU64,
}

impl Outside {
    pub(crate) fn new(
        config: Config,
        catalogue: Arc<dyn Catalogue>,
        pool: Arc<dyn Pool>,
        refill: Arc<dyn Refill>,
    ) -> Self {
        Self {
            locations: Locations::new(config.locations),
            edges: Edges::new(config.edge_cache_bytes),
            buffers: Arc::default(),
            stats: Stats::default(),
            uses: Uses::default(),
            hedging: Hedging::default(),
            spread: AtomicU64::new(config.seed),
            config,
            catalogue,
            pool,
            refill,
        }
    }
}

/// Bytes for the kernel.
#[derive(Debug)]
pub struct Data {
    pub(crate) buffer: Buffer,
    pub(crate) range: Range<usize>,
}

impl Deref for Data {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.buffer[self.range.clone()]
    }
}

/// Reads `len` bytes at `offset` of the EROFS file of `view`: metadata from the index, the data
/// region from the pool. The range lies inside the file. `what` names the file for the log.
pub(crate) fn read(
    outside: &Outside,
    view: &View,
    opened: &Opened,
    offset: u64,
    len: usize,
    what: &dyn Fn() -> String,
) -> Result<Data> {
    let index = opened.index(outside);
    let mut buffer = outside.buffers.take(len + plan::EDGE_ROOM);
    let meta_len = opened
        .header
        .meta_len
        .saturating_sub(offset)
        .min(len as u64) as usize;
    if meta_len > 0 {
        index
            .read_meta(offset, &mut buffer[..meta_len])
            .map_err(|error| view.error(error))?;
    }
    if len > meta_len {
        let segments = index
            .segments(offset + meta_len as u64, (len - meta_len) as u64)
            .map_err(|error| view.error(error))?;
        let mut plan = Plan::new(outside, len);
        for segment in &segments {
            let at = (segment.offset - offset) as usize;
            plan.add(view, &index, segment, at, &mut buffer)?;
        }
        run(outside, view, &plan, &mut buffer, what)?;
        view.read_bytes
            .fetch_add((len - meta_len) as u64, Ordering::Relaxed);
    }
    outside.stats.reads.add(1);
    outside.stats.read_bytes.add(len as u64);
    Ok(Data {
        buffer,
        range: 0..len,
    })
}

fn run(
    outside: &Outside,
    view: &View,
    plan: &Plan<'_>,
    buffer: &mut [u8],
    what: &dyn Fn() -> String,
) -> Result<()> {
    let verify = outside.config.verify;
    let check = |want: usize, bytes: &[u8]| {
        let Some(check) = plan.checks.get(want) else {
            return false;
        };
        let hashes = &plan.hashes[check.hashes.clone()];
        let right = |(granule, number): (&[u8], usize)| {
            let hash = number.checked_sub(check.first_hash);
            let hash = hash.and_then(|place| hashes.get(place));
            verify_granule(&check.id, check.object_len, hash, number, granule)
        };
        !verify
            || bytes
                .chunks(harbour_image::object::GRANULE)
                .zip(check.first..)
                .all(right)
    };
    let errand = Errand {
        owner: view.number,
        packs: &plan.packs,
        wants: &plan.wants,
        refill: true,
    };
    outside
        .fetch(&errand, buffer, &check)
        .map_err(|missed| match missed {
            Missed::Later => Error::Later,
            Missed::Failed(tried) => Error::Unreadable {
                what: what(),
                tried,
            },
        })?;
    if verify {
        outside.stats.verified.add(plan.granules);
    }
    for edge in &plan.edges {
        let from = edge.slot + edge.from;
        buffer.copy_within(from..from + edge.len, edge.to);
        outside.edges.put(
            &edge.id,
            edge.number,
            &buffer[edge.slot..edge.slot + edge.granule_len],
        );
    }
    Ok(())
}

impl std::fmt::Display for Missed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Later => f.write_str("needs time"),
            Self::Failed(tried) => write!(f, "tried {tried}"),
        }
    }
}

impl std::error::Error for Missed {}
