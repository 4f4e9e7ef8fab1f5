//! Who is let in: hellos as they come, and what their proofs are worth.

use std::{
    io::{self, Read as _},
    net::{IpAddr, TcpStream},
    sync::atomic::Ordering,
    time::Instant,
};

use super::Shared;
use crate::{
    tcp::frames::{Answer, Grant, Greeting, HEAD_LEN_BYTES, Hello, Purpose, Refusal},
    token::{Proof, Right},
    transport::Access,
    wire::FrameError,
};

/// A connection that has not shown its proofs yet.
pub(super) struct Waiting {
    pub(super) stream: TcpStream,
    pub(super) from: IpAddr,
    pub(super) until: Instant,
    pub(super) greeting: Greeting,
    pub(super) hello: Vec<u8>,
}

/// A connection that has.
pub(super) struct Admitted {
    pub(super) epoch: u64,
    pub(super) grants: Vec<Grant>,
    pub(super) purpose: Purpose,
}

impl Waiting {
    /// Takes what has come of the hello and no more: the hello once it is whole, an error with the
    /// answer that the peer is worth.
    pub(super) fn hear(&mut self) -> Result<Option<Hello>, Option<Answer>> {
        loop {
            let have = self.hello.len();
            let want = if have < HEAD_LEN_BYTES {
                HEAD_LEN_BYTES
            } else {
                Hello::len(&self.hello).map_err(|error| Some(malformed(error)))?
            };
            if have == want {
                let hello = Hello::parse(&self.hello);
                return hello.map(Some).map_err(|error| Some(malformed(error)));
            }
            // At most `MAX_HELLO_LEN_BYTES`, or it was an error.
            self.hello.resize(want, 0);
            let rest = self.hello.get_mut(have..).unwrap_or_default();
            let read = self.stream.read(rest);
            self.hello.truncate(have + *read.as_ref().unwrap_or(&0));
            match read {
                Ok(0) => return Err(None),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(_) => return Err(None),
            }
        }
    }
}

impl Shared {
    /// What a hello is worth: rights, or the answer that says why not.
    pub(super) fn admit(
        &self,
        greeting: &Greeting,
        hello: Hello,
    ) -> Result<Admitted, Option<Answer>> {
        let lent = self.lent.read().clone();
        let epoch = self.epoch.load(Ordering::Acquire);
        if hello.epoch != greeting.epoch || greeting.epoch != epoch {
            return Err(Some(Answer::WrongEpoch { actual: epoch }));
        }
        // Between two epochs.
        let lent = lent.filter(|lent| lent.epoch == epoch);
        let lent = lent.ok_or(Some(Answer::Refused(Refusal::Busy)))?;
        if hello.purpose != Purpose::Data && self.verbs.is_none() {
            return Err(Some(Answer::Refused(Refusal::Verbs)));
        }
        let mut grants: Vec<Grant> = Vec::new();
        for (id, right, proof) in &hello.proofs {
            // One that was given back is no crime to have known.
            let Some(region) = lent.get(*id) else {
                continue;
            };
            let token = match right {
                Right::Read => region.key.read,
                Right::Write => region.key.write,
            };
            let good = token.is_some_and(|token| {
                Proof::new(&token, &greeting.nonce, *id, *right, epoch).matches(proof)
            });
            if !good {
                return Err(Some(Answer::Refused(Refusal::Token)));
            }
            let (read, write) = (*right == Right::Read, *right == Right::Write);
            match grants.last_mut() {
                Some(grant) if grant.info.id == *id => {
                    grant.read |= read;
                    grant.write |= write;
                }
                _ => grants.push(Grant {
                    info: region.info,
                    read,
                    write,
                }),
            }
        }
        // A reader's connection writes nothing, whatever it proved.
        if hello.access == Access::Read {
            grants.iter_mut().for_each(|grant| grant.write = false);
            grants.retain(|grant| grant.read);
        }
        Ok(Admitted {
            epoch,
            grants,
            purpose: hello.purpose,
        })
    }
}

fn malformed(error: FrameError) -> Answer {
    Answer::Refused(match error {
        FrameError::Version(_) => Refusal::Version,
        _ => Refusal::Malformed,
    })
}
