//! Memory that replies are put together in, kept between reads so that it is never zeroed twice.

use std::{
    ops::{Deref, DerefMut},
    sync::Arc,
};

use parking_lot::Mutex;

/// Sizes that buffers come in, in bytes. The largest holds the largest read that the session
/// allows with a granule at either end.
const SIZES: [usize; 3] = [48 << 10, 160 << 10, (1 << 20) + (64 << 10)];
/// Buffers of each size that are kept; more are given back to the allocator.
const KEPT: usize = 8;

/// Buffers at rest.
#[derive(Debug, Default)]
pub(crate) struct Buffers {
    free: [Mutex<Vec<Vec<u8>>>; SIZES.len()],
}

/// A buffer at work. Its content is left over from an earlier use until it is written.
#[derive(Debug)]
pub(crate) struct Buffer {
    bytes: Vec<u8>,
    home: Option<(Arc<Buffers>, usize)>,
}

impl Buffers {
    /// A buffer of at least `len` bytes.
    pub(crate) fn take(self: &Arc<Self>, len: usize) -> Buffer {
        let Some(class) = SIZES.iter().position(|size| *size >= len) else {
            return Buffer {
                bytes: vec![0; len],
                home: None,
            };
        };
        let bytes = self.free[class]
            .lock()
            .pop()
            .unwrap_or_else(|| vec![0; SIZES[class]]);
        Buffer {
            bytes,
            home: Some((Arc::clone(self), class)),
        }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let Some((home, class)) = self.home.take() {
            let mut free = home.free[class].lock();
            if free.len() < KEPT {
                free.push(std::mem::take(&mut self.bytes));
            }
        }
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_come_back_and_odd_ones_do_not() {
        let buffers = Arc::new(Buffers::default());
        let mut buffer = buffers.take(100);
        assert_eq!(buffer.len(), SIZES[0]);
        buffer[0] = 7;
        drop(buffer);
        assert_eq!(buffers.take(1)[0], 7, "kept, not zeroed");
        assert_eq!(buffers.take(5 << 20).len(), 5 << 20);
        let many: Vec<_> = (0..2 * KEPT).map(|_| buffers.take(1)).collect();
        drop(many);
        assert_eq!(buffers.free[0].lock().len(), KEPT);
    }
}
