//! Figures for people and for metrics.

use std::sync::atomic::Ordering;

use harbour_metad_client::v1;

use super::Engine;
use crate::error::Error;

/// Pulls and nodes that a status lists at most: it has to fit a frame.
const LISTED_MAX: usize = 1024;

impl Engine {
    /// Figures of everything.
    pub fn status(&self) -> Result<v1::StatusReply, Error> {
        let figures = self.store.read(|read| read.figures())?;
        let now_ms = self.now_ms();
        let ms = |ms: u64| u32::try_from(ms).unwrap_or(u32::MAX);
        let state = self.lock();
        let books = state.space.books();
        let read = state.writer.read();
        let mut pulls = Vec::new();
        for pull in state.pulls.values().take(LISTED_MAX) {
            pulls.push(v1::PullStatus {
                pull: pull.id,
                what: pull.what.chars().take(256).collect(),
                host: pull.host.clone(),
                pid: pull.pid,
                reserved_bytes: read.reserved_bytes(pull.id)?,
                expires_ms: ms(state
                    .locks
                    .until_ms(pull.id)
                    .unwrap_or(0)
                    .saturating_sub(now_ms)),
            });
        }
        let nodes = state
            .nodes
            .iter()
            .take(LISTED_MAX)
            .map(|(id, node)| v1::NodeStatus {
                node: *id,
                name: node.name.clone(),
                heard_ms_ago: ms(now_ms.saturating_sub(node.heard_ms)),
                acknowledged_generation: node.acknowledged,
                held: u32::try_from(node.held.len()).unwrap_or(u32::MAX),
            });
        Ok(v1::StatusReply {
            lent_bytes: books.lent,
            used_bytes: books.used,
            reserved_bytes: books.reserved,
            quarantined_bytes: books.quarantined,
            images: figures.images,
            layers: figures.layers,
            objects: figures.objects,
            packs: figures.packs,
            logical_bytes: figures.logical_bytes,
            pulls,
            nodes: nodes.collect(),
            policy: state.policy.name().into(),
            evictions: figures.evictions,
            database_bytes: self.store.database_bytes(),
            version: env!("CARGO_PKG_VERSION").into(),
            uptime_ms: now_ms.saturating_sub(state.started_ms),
            replicas_wanted: state.copies.standings.wanted,
            replicas_missing: state.copies.standings.missing,
            packs_short: state.copies.standings.short,
            packs_lost: state.copies.standings.lost,
            copies_running: u32::try_from(state.copies.under_way.len()).unwrap_or(u32::MAX),
            copies_done: state.copies.done,
            copies_failed: state.copies.failures,
            copied_bytes: state.copies.bytes,
            moved_bytes: state.copies.moved_bytes,
            rebalancing: state.copies.rebalancing,
            pool_reads: self.reads.load(Ordering::Relaxed),
            pool_misses: self.misses.load(Ordering::Relaxed),
            replicas_default: self.options.replicas,
        })
    }

    /// Donors that readers are told of.
    pub fn live_donors(&self) -> usize {
        self.lock()
            .donors
            .values()
            .filter(|donor| donor.live)
            .count()
    }
}
