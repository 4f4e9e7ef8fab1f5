//! How long a wait for a completion stays awake before it sleeps.

use std::time::Duration;

/// A wait that stays awake does so for at least this.
const LEAST: Duration = Duration::from_micros(25);
/// No wait stays awake for longer: sleeping and waking costs less than this on most machines, and
/// no more than a few times this in a guest.
const MOST: Duration = Duration::from_micros(500);
/// After waits that were awake for [`MOST`] in vain, so many sleep at once, doubled each time.
const REST_DOUBLINGS: u32 = 6;

/// What one lane has learnt of its device.
///
/// It learns from completions that came to a waiter awake. The time of a wait that slept says how
/// long waking took, not the device; learnt from, it would keep waits asleep for ever on a machine
/// where waking is slow.
#[derive(Clone, Debug, Default)]
pub(super) struct Patience {
    /// Mean that forgets all but the last few.
    typical: Duration,
    /// Waits in a row that were awake for [`MOST`] and had nothing.
    vain: u32,
    /// Waits that are to sleep at once.
    rest: u32,
}

impl Patience {
    /// How long the next wait stays awake.
    pub(super) fn awake(&mut self) -> Duration {
        if self.rest > 0 {
            self.rest -= 1;
            return Duration::ZERO;
        }
        (2 * self.typical).clamp(LEAST, MOST)
    }

    /// A wait that was to stay awake for `awake` had something after `waited`.
    pub(super) fn learn(&mut self, awake: Duration, waited: Duration) {
        if awake.is_zero() {
            return;
        }
        if waited <= awake {
            self.typical = (3 * self.typical + waited) / 4;
            self.vain = 0;
        } else if awake < MOST {
            // As far as is known the device became slower: stay awake for twice as long.
            self.typical = awake;
        } else {
            self.vain = (self.vain + 1).min(REST_DOUBLINGS);
            self.rest = 1 << self.vain;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A device that takes `device` a piece on a machine where waking takes `wake`: how long each of
    /// `count` waits took, and how long it was awake.
    fn waits(
        patience: &mut Patience,
        device: Duration,
        wake: Duration,
        count: u32,
    ) -> Vec<(Duration, Duration)> {
        let mut all = Vec::new();
        for _ in 0..count {
            let awake = patience.awake();
            let waited = if device <= awake {
                device
            } else {
                device + wake
            };
            patience.learn(awake, waited);
            all.push((waited, awake.min(waited)));
        }
        all
    }

    const fn us(count: u64) -> Duration {
        Duration::from_micros(count)
    }

    #[test]
    fn a_device_as_fast_as_most_is_waited_for_awake() {
        for device in [3, 10, 60, 110, 240, 490] {
            let mut patience = Patience::default();
            // However slow waking is.
            let all = waits(&mut patience, us(device), us(2_000), 40);
            let last = &all[10..];
            assert!(last.iter().all(|wait| wait.0 == us(device)), "{device} us");
        }
    }

    #[test]
    fn a_slow_spell_is_forgotten() {
        let mut patience = Patience::default();
        waits(&mut patience, us(40_000), us(300), 500);
        let all = waits(&mut patience, us(100), us(300), 100);
        let last = &all[70..];
        assert!(last.iter().all(|wait| wait.0 == us(100)), "{last:?}");
    }

    #[test]
    fn a_slow_device_costs_little_processor_time() {
        let mut patience = Patience::default();
        let all = waits(&mut patience, us(1_000), us(50), 1_000);
        let awake: Duration = all.iter().map(|wait| wait.1).sum();
        let waited: Duration = all.iter().map(|wait| wait.0).sum();
        assert!(awake * 50 < waited, "{awake:?} of {waited:?}");
    }
}
