//! Capabilities: who holds a region's token may read it, or write it.
//!
//! A donor draws one read token and one write token for each region. They reach readers through
//! metad and never over a data connection: there each side of it shows a [`Proof`], a keyed hash
//! over the connection's nonce, so that what was overheard is worth nothing on another connection.

use std::{
    fs::File,
    io::{self, Read as _},
};

use crate::transport::{Access, RegionId};

/// A secret of a donor and its readers; all zeros when there is none.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub struct Token(pub [u8; 32]);

impl Token {
    /// No token.
    pub const NONE: Self = Self([0; 32]);

    /// A new one, from the kernel's generator.
    pub fn random() -> io::Result<Self> {
        random_bytes().map(Self)
    }

    /// A token that came as bytes: `None` unless there are 32 of them, not all zero.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let token = Self(bytes.try_into().ok()?);
        (token != Self::NONE).then_some(token)
    }

    /// Equality in a time that does not depend on where the two differ.
    pub fn matches(&self, other: &Self) -> bool {
        self.0
            .iter()
            .zip(other.0)
            .fold(0, |differ, (a, b)| differ | (a ^ b))
            == 0
    }
}

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if *self == Self::NONE {
            "Token::NONE"
        } else {
            "Token(…)"
        })
    }
}

/// What a caller holds for one region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionKey {
    /// The region.
    pub region: RegionId,
    /// Lets it be read.
    pub read: Option<Token>,
    /// Lets it be written.
    pub write: Option<Token>,
}

/// What one token opens. Not [`Access`]: a connection that reads and writes shows two.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Right {
    /// Reading.
    Read,
    /// Writing.
    Write,
}

/// Shows, on one connection, that its sender holds a token.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Proof(pub [u8; 32]);

impl std::fmt::Debug for Proof {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Proof(…)")
    }
}

/// First bytes of what a proof hashes, so that a token means nothing in another protocol.
const PROOF_CONTEXT: [u8; 16] = *b"harbour proof 1\0";

impl Proof {
    /// BLAKE3 keyed with the token, over context, nonce, region, right and epoch.
    pub fn new(
        token: &Token,
        nonce: &[u8; 32],
        region: RegionId,
        right: Right,
        epoch: u64,
    ) -> Self {
        let right: u32 = match right {
            Right::Read => 1,
            Right::Write => 2,
        };
        let mut hasher = blake3::Hasher::new_keyed(&token.0);
        hasher.update(&PROOF_CONTEXT);
        hasher.update(nonce);
        hasher.update(&region.0.to_le_bytes());
        hasher.update(&right.to_le_bytes());
        hasher.update(&epoch.to_le_bytes());
        Self(*hasher.finalize().as_bytes())
    }

    /// Equality in a time that does not depend on where the two differ.
    pub fn matches(&self, other: &Self) -> bool {
        Token(self.0).matches(&Token(other.0))
    }
}

/// The tokens of `keys` that a connection with `access` shows: region, right and token, by growing
/// region and right. One that wants to write shows read tokens too.
pub(crate) fn shown(keys: &[RegionKey], access: Access) -> Vec<(RegionId, Right, Token)> {
    let mut shown = Vec::new();
    for key in keys {
        if let Some(token) = key.read {
            shown.push((key.region, Right::Read, token));
        }
        if let (Access::ReadWrite, Some(token)) = (access, key.write) {
            shown.push((key.region, Right::Write, token));
        }
    }
    shown.sort_by_key(|(region, right, _)| (*region, *right));
    shown.dedup_by_key(|(region, right, _)| (*region, *right));
    shown
}

/// Bytes from the kernel's generator.
pub(crate) fn random_bytes<const N: usize>() -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn proofs_are_golden_and_bound_to_everything() {
        let (token, nonce) = (Token([7; 32]), [9; 32]);
        let proof = |token, nonce, region, right, epoch| {
            Proof::new(token, nonce, RegionId(region), right, epoch)
        };
        let golden = proof(&token, &nonce, 3, Right::Read, 5);
        let mut message = PROOF_CONTEXT.to_vec();
        message.extend([9; 32]);
        message.extend([3, 0, 0, 0, 1, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(golden.0, *blake3::keyed_hash(&[7; 32], &message).as_bytes());
        for other in [
            proof(&Token([8; 32]), &nonce, 3, Right::Read, 5),
            proof(&token, &[8; 32], 3, Right::Read, 5),
            proof(&token, &nonce, 4, Right::Read, 5),
            proof(&token, &nonce, 3, Right::Write, 5),
            proof(&token, &nonce, 3, Right::Read, 6),
        ] {
            assert!(!golden.matches(&other));
        }
        assert!(golden.matches(&golden));
    }

    #[test]
    fn secrets_do_not_show() {
        let key = RegionKey {
            region: RegionId(1),
            read: Some(Token([0xAB; 32])),
            write: None,
        };
        let text = format!("{key:?} {:?}", Proof([0xAB; 32]));
        assert!(!text.contains("171") && !text.contains("ab"), "{text}");
    }

    #[test]
    fn only_what_is_needed_is_shown() {
        let key = |region, read, write| RegionKey {
            region: RegionId(region),
            read: Some(Token([read; 32])),
            write: Some(Token([write; 32])),
        };
        let keys = [key(2, 3, 4), key(1, 1, 2)];
        let regions = |access| -> Vec<_> {
            let shown = shown(&keys, access).into_iter();
            shown
                .map(|(region, right, token)| (region.0, right, token.0[0]))
                .collect()
        };
        use Right::{Read, Write};
        assert_eq!(regions(Access::Read), [(1, Read, 1), (2, Read, 3)]);
        let both = [(1, Read, 1), (1, Write, 2), (2, Read, 3), (2, Write, 4)];
        assert_eq!(regions(Access::ReadWrite), both);
        assert_eq!(Token::from_bytes(&[0; 32]), None);
        assert_eq!(Token::from_bytes(&[1; 31]), None);
        assert_eq!(Token::from_bytes(&[1; 32]), Some(Token([1; 32])));
    }
}
