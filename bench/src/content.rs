//! Bytes from a seed.

use std::io;

/// SplitMix64: small, fast, and the same for ever, which a dependency's generator need not be.
/// Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    /// A generator whose numbers follow from `seed` alone.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `end`, which is not 0.
    pub fn below(&mut self, end: u64) -> u64 {
        ((u128::from(self.bits()) * u128::from(end)) >> 64) as u64
    }

    /// A number from 0 to below 1.
    pub fn unit(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// A length whose logarithm is spread like a bell, as file sizes are: half are below `median`.
    pub fn length(&mut self, median: f64, sigma: f64) -> u64 {
        // Twelve uniform numbers less six come close enough to a normal one.
        let normal: f64 = (0..12).map(|_| self.unit()).sum::<f64>() - 6.0;
        (median * (sigma * normal).exp()) as u64
    }

    /// Puts `items` into an order that follows from the seed.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.below(last as u64 + 1) as usize);
        }
    }
}

/// What a file's bytes are like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Texture {
    /// Nothing to gain by compression.
    Random,
    /// Words with a few incompressible blocks between: what `percent` says of each 4 KiB block.
    Text {
        /// Blocks of a hundred that are random.
        percent: u8,
    },
}

/// A file's content as a stream.
pub struct Content {
    rng: Rng,
    texture: Texture,
    left: u64,
    block: Vec<u8>,
    taken: usize,
}

/// Unit in which texture changes, in bytes.
const BLOCK: usize = 4096;
/// Words that text is made of; a power of two.
const WORDS: u64 = 512;

impl Content {
    /// `len` bytes that follow from `seed`.
    pub fn new(seed: u64, texture: Texture, len: u64) -> Self {
        Self {
            rng: Rng::new(seed),
            texture,
            left: len,
            block: Vec::with_capacity(BLOCK + 64),
            taken: 0,
        }
    }

    fn refill(&mut self) {
        self.block.clear();
        self.taken = 0;
        let random = match self.texture {
            Texture::Random => true,
            Texture::Text { percent } => self.rng.below(100) < u64::from(percent),
        };
        if random {
            while self.block.len() < BLOCK {
                self.block.extend_from_slice(&self.rng.bits().to_le_bytes());
            }
            return;
        }
        while self.block.len() < BLOCK {
            let bits = self.rng.bits();
            // The product of two uniform numbers favours low ones, as language favours its
            // common words.
            let word = ((bits % WORDS) * ((bits >> 16) % WORDS)) / WORDS;
            push_word(&mut self.block, word);
            self.block.push(if (bits >> 40).is_multiple_of(12) {
                b'\n'
            } else {
                b' '
            });
        }
        self.block.truncate(BLOCK);
    }
}

/// Appends the word of this number: 3 to 10 letters.
fn push_word(into: &mut Vec<u8>, number: u64) {
    let mut letters = Rng::new(number).bits();
    let len = 3 + letters % 8;
    letters >>= 3;
    for _ in 0..len {
        into.push(b'a' + (letters % 26) as u8);
        letters /= 26;
    }
}

impl io::Read for Content {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if self.left == 0 || into.is_empty() {
            return Ok(0);
        }
        if self.taken == self.block.len() {
            self.refill();
        }
        let from = &self.block[self.taken..];
        let n = from
            .len()
            .min(into.len())
            .min(usize::try_from(self.left).unwrap_or(usize::MAX));
        into[..n].copy_from_slice(&from[..n]);
        self.taken += n;
        self.left -= n as u64;
        Ok(n)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use std::io::{Read as _, Write as _};

    use super::*;

    fn bytes(seed: u64, texture: Texture, len: u64) -> Vec<u8> {
        let mut out = Vec::new();
        Content::new(seed, texture, len)
            .read_to_end(&mut out)
            .unwrap();
        out
    }

    fn deflated(data: &[u8]) -> usize {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::new(6));
        encoder.write_all(data).unwrap();
        encoder.finish().unwrap().len()
    }

    #[test]
    fn content_follows_from_its_seed_and_compresses_as_promised() {
        for len in [0, 1, 4095, 4096, 4097, 1 << 20] {
            let text = bytes(7, Texture::Text { percent: 8 }, len);
            assert_eq!(text.len() as u64, len);
            assert_eq!(text, bytes(7, Texture::Text { percent: 8 }, len));
        }
        let text = bytes(1, Texture::Text { percent: 8 }, 4 << 20);
        assert_ne!(text, bytes(2, Texture::Text { percent: 8 }, 4 << 20));
        let ratio = deflated(&text) as f64 / text.len() as f64;
        assert!((0.30..0.48).contains(&ratio), "text deflates to {ratio}");
        let random = bytes(1, Texture::Random, 1 << 20);
        assert!(deflated(&random) >= random.len());
    }

    #[test]
    fn lengths_and_shuffles_are_sane() {
        let mut rng = Rng::new(3);
        let mut lengths: Vec<u64> = (0..10_001).map(|_| rng.length(4000.0, 1.3)).collect();
        lengths.sort_unstable();
        assert!(
            (3500..4500).contains(&lengths[5000]),
            "median {}",
            lengths[5000]
        );
        let mut items: Vec<u32> = (0..1000).collect();
        rng.shuffle(&mut items);
        assert_ne!(items[..10], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]);
        items.sort_unstable();
        assert!(items.iter().copied().eq(0..1000));
        assert!((0..1000).all(|_| rng.below(7) < 7));
    }
}
