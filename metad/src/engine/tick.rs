//! What time does: leases end, quarantine ends, what nobody holds goes.

use super::Engine;
use crate::error::Error;

impl Engine {
    /// To be called a few times a second. Ends what has run out, collects, and plans copies.
    pub fn tick(&self) -> Result<(), Error> {
        self.end_leases()?;
        self.collect_now()?;
        self.replicate()?;
        let mut state = self.lock();
        let freed = self.release(&mut state)?;
        drop(state);
        if freed > 0 {
            self.tell_space_freed();
        }
        Ok(())
    }

    fn end_leases(&self) -> Result<(), Error> {
        let mut state = self.lock();
        let now_ms = self.now_ms();
        let before = state.nodes.len();
        state.nodes.retain(|id, node| {
            let lives = node.expires_ms + self.options.timing.margin_ms > now_ms;
            if !lives {
                tracing::info!(
                    node = id,
                    name = node.name,
                    "node is silent, its lease ended"
                );
            }
            lives
        });
        if state.nodes.len() < before {
            state.collect = true;
        }
        let silent = state
            .donors
            .iter()
            .filter(|(_, donor)| donor.live && donor.expires_ms <= now_ms);
        for id in silent.map(|(id, _)| *id).collect::<Vec<_>>() {
            self.set_live(&mut state, id, false)?;
        }
        self.expire_copies(&mut state, now_ms)?;
        let forget_ms = self.options.timing.donor_forget_ms;
        let gone = state
            .donors
            .iter()
            .filter(|(_, donor)| !donor.live && donor.heard_ms + forget_ms <= now_ms);
        for id in gone.map(|(id, _)| *id).collect::<Vec<_>>() {
            self.forget_donor(&mut state, id)?;
        }
        self.expire_pulls(&mut state, now_ms)
    }
}
