//! How a connection begins, on the reader's side: greeting, hello, answer. The same for data and
//! for a verbs set-up, which keeps the stream as the sign of life of its queue pairs.

use std::{
    io,
    net::{SocketAddr, TcpStream},
    time::Instant,
};

use super::{
    frames::{
        Answer, GREETING_LEN_BYTES, Grant, Greeting, HEAD_LEN_BYTES, Hello, MAX_PROOFS, Purpose,
        Refusal,
    },
    socket,
};
use crate::{
    token::{Proof, RegionKey, shown},
    transport::{Access, TransportError, refused, unreachable},
};

/// Whom to connect to, and what for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Target<'a> {
    /// The donor's socket.
    pub(crate) peer: SocketAddr,
    /// Its address as metad gave it, for errors.
    pub(crate) address: &'a str,
    /// The epoch that the caller's locations are of, or 0 for whichever it is in.
    pub(crate) epoch: u64,
    /// What the connection will be used for.
    pub(crate) access: Access,
    /// What the caller holds. Shown are those that `access` needs.
    pub(crate) keys: &'a [RegionKey],
}

/// A connection that a donor welcomed.
#[derive(Debug)]
pub(crate) struct Opened {
    /// Non-blocking, with nothing in it.
    pub(crate) stream: TcpStream,
    /// The donor's epoch.
    pub(crate) epoch: u64,
    /// What may be done with which region, by growing id.
    pub(crate) regions: Vec<Grant>,
    /// The donor's half of a verbs set-up; empty for data.
    #[allow(dead_code, reason = "for verbs; over TCP it is empty")]
    pub(crate) payload: Vec<u8>,
}

/// Connects, shows proofs, and takes the answer.
///
/// # Errors
/// `Unreachable` when nobody answers there or the donor is busy, `WrongEpoch`, `Refused` when the
/// donor refuses or breaks the protocol, `Deadline`.
pub(crate) fn open(
    target: Target<'_>,
    purpose: Purpose,
    deadline: Instant,
) -> Result<Opened, TransportError> {
    let lost = |error| unreachable(target.address, error);
    let in_time = |done: bool| {
        if done {
            Ok(())
        } else {
            Err(TransportError::Deadline)
        }
    };
    let stream = socket::dial(target.peer, deadline)
        .map_err(lost)?
        .ok_or(TransportError::Deadline)?;
    let mut greeting = [0; GREETING_LEN_BYTES];
    in_time(socket::receive_all(&stream, &mut greeting, deadline).map_err(lost)?)?;
    let greeting = Greeting::parse(&greeting)
        .map_err(|error| refused(target.address, format!("it greets with {error}")))?;
    if target.epoch != 0 && target.epoch != greeting.epoch {
        return Err(TransportError::WrongEpoch {
            wanted: target.epoch,
            actual: greeting.epoch,
        });
    }
    let hello = Hello {
        purpose,
        access: target.access,
        epoch: greeting.epoch,
        proofs: proofs(&target, &greeting)?,
    };
    in_time(socket::send_all(&stream, &hello.encode(), deadline).map_err(lost)?)?;
    let answer = receive_answer(&stream, target.address, deadline)?;
    let (regions, payload) = welcome(answer, &hello, target)?;
    Ok(Opened {
        stream,
        epoch: greeting.epoch,
        regions,
        payload,
    })
}

fn proofs(
    target: &Target<'_>,
    greeting: &Greeting,
) -> Result<Vec<(crate::transport::RegionId, crate::token::Right, Proof)>, TransportError> {
    let shown = shown(target.keys, target.access);
    if shown.is_empty() || shown.len() > MAX_PROOFS {
        let reason = format!(
            "{} tokens of it are known here, 1 to {MAX_PROOFS} can be shown",
            shown.len()
        );
        return Err(refused(target.address, reason));
    }
    let proof = |(region, right, token)| {
        let proof = Proof::new(&token, &greeting.nonce, region, right, greeting.epoch);
        (region, right, proof)
    };
    Ok(shown.into_iter().map(proof).collect())
}

fn receive_answer(
    stream: &TcpStream,
    address: &str,
    deadline: Instant,
) -> Result<Answer, TransportError> {
    let lost = |error| unreachable(address, error);
    let wrong = |error: crate::wire::FrameError| refused(address, format!("it answers {error}"));
    let mut answer = vec![0; HEAD_LEN_BYTES];
    if !socket::receive_all(stream, &mut answer, deadline).map_err(lost)? {
        return Err(TransportError::Deadline);
    }
    // At most `MAX_ANSWER_LEN_BYTES`, or it is an error.
    answer.resize(Answer::len(&answer).map_err(wrong)?, 0);
    let rest = answer.get_mut(HEAD_LEN_BYTES..).unwrap_or_default();
    if !socket::receive_all(stream, rest, deadline).map_err(lost)? {
        return Err(TransportError::Deadline);
    }
    Answer::parse(&answer).map_err(wrong)
}

/// A welcome must be one to what was asked for: no other epoch, no right that was not proved.
fn welcome(
    answer: Answer,
    hello: &Hello,
    target: Target<'_>,
) -> Result<(Vec<Grant>, Vec<u8>), TransportError> {
    let refused = |reason: String| Err(refused(target.address, reason));
    match answer {
        Answer::Welcome {
            epoch,
            regions,
            payload,
        } => {
            if epoch != hello.epoch {
                return refused(format!(
                    "it greeted in epoch {} and lends {epoch}",
                    hello.epoch
                ));
            }
            if payload.is_empty() != (hello.purpose == Purpose::Data) {
                return refused(format!("a payload of {} bytes out of place", payload.len()));
            }
            let proved = |grant: &Grant| {
                use crate::token::Right::{Read, Write};
                let has = |wanted| {
                    let mut proofs = hello.proofs.iter();
                    proofs.any(|(region, right, _)| (*region, *right) == (grant.info.id, wanted))
                };
                (!grant.read || has(Read)) && (!grant.write || has(Write))
            };
            match regions.iter().find(|grant| !proved(grant)) {
                Some(grant) => refused(format!(
                    "it grants what nobody asked for of {:?}",
                    grant.info.id
                )),
                None => Ok((regions, payload)),
            }
        }
        Answer::WrongEpoch { actual } if actual != hello.epoch => Err(TransportError::WrongEpoch {
            wanted: hello.epoch,
            actual,
        }),
        Answer::WrongEpoch { .. } => refused("it is in the epoch that it calls wrong".to_owned()),
        Answer::Refused(Refusal::Busy) => {
            let busy = io::Error::new(io::ErrorKind::WouldBlock, Refusal::Busy.to_string());
            Err(unreachable(target.address, busy))
        }
        Answer::Refused(refusal) => refused(refusal.to_string()),
    }
}
