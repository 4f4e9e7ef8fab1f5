#![allow(clippy::unwrap_used, clippy::expect_used)]

use proptest::prelude::*;

use super::{
    data::{MAX_REQUEST_BYTES, Outcome, Reply, Request, Way},
    *,
};

const MIB: u64 = 1 << 20;

fn bytes(hex: &str) -> Vec<u8> {
    let digits: Vec<u8> = hex
        .chars()
        .filter_map(|digit| digit.to_digit(16))
        .map(|digit| digit as u8)
        .collect();
    digits
        .chunks(2)
        .map(|pair| pair[0] << 4 | pair[1])
        .collect()
}

fn grant(id: u32, read: bool, write: bool) -> Grant {
    Grant {
        info: RegionInfo {
            id: RegionId(id),
            len: 2 * MIB,
            huge_pages: false,
        },
        read,
        write,
    }
}

fn hello() -> Hello {
    Hello {
        purpose: Purpose::Data,
        access: Access::ReadWrite,
        epoch: 5,
        proofs: vec![
            (RegionId(3), Right::Read, Proof([0xAA; 32])),
            (RegionId(3), Right::Write, Proof([0xBB; 32])),
        ],
    }
}

#[test]
fn golden_handshake() {
    let greeting = Greeting {
        epoch: 0x1122_3344_5566_7788,
        nonce: std::array::from_fn(|at| at as u8),
    };
    let golden = bytes(
        "4852425254435000 0100 0100 00000000 8877665544332211
         000102030405060708090a0b0c0d0e0f 101112131415161718191a1b1c1d1e1f 0000000000000000",
    );
    assert_eq!(greeting.encode(), golden[..]);
    assert_eq!(Greeting::parse(&golden), Ok(greeting));
    let golden = bytes(&format!(
        "4852425254435000 0100 0200 0200 0200 0500000000000000 00000000 00000000
         03000000 01000000 {} 03000000 02000000 {}",
        "aa".repeat(32),
        "bb".repeat(32)
    ));
    assert_eq!(hello().encode(), golden);
    assert_eq!(Hello::parse(&golden), Ok(hello()));
    let verbs = Hello {
        purpose: Purpose::Verbs(vec![1, 2, 3]),
        access: Access::Read,
        proofs: hello().proofs[..1].to_vec(),
        ..hello()
    };
    let golden = bytes(&format!(
        "4852425254435000 0100 0300 0100 0100 0500000000000000 03000000 00000000
         03000000 01000000 {} 010203",
        "aa".repeat(32)
    ));
    assert_eq!(verbs.encode(), golden);
    assert_eq!(Hello::parse(&golden), Ok(verbs));
    for (answer, golden) in [
        (
            Answer::Welcome {
                epoch: 5,
                regions: vec![grant(0, true, false), grant(7, true, true)],
                payload: vec![9],
            },
            "4852425254435000 0100 0400 02000000 0500000000000000 01000000 00000000
             00000000 02000000 0000200000000000 07000000 06000000 0000200000000000 09",
        ),
        (
            Answer::WrongEpoch { actual: 258 },
            "4852425254435000 0100 0500 00000000 0201000000000000 00000000 00000000",
        ),
        (
            Answer::Refused(Refusal::Token),
            "4852425254435000 0100 0600 03000000 0000000000000000 00000000 00000000",
        ),
    ] {
        let golden = bytes(golden);
        assert_eq!(answer.encode(), golden, "{answer:?}");
        assert_eq!(Answer::parse(&golden), Ok(answer));
    }
}

#[test]
fn golden_data() {
    let request = Request {
        id: 0x0102,
        way: Way::Write,
        region: RegionId(7),
        offset: 0x1122_3344_5566,
        len: 4096,
    };
    let golden = bytes("0201000000000000 02000000 07000000 6655443322110000 00100000 00000000");
    assert_eq!(request.encode(), golden[..]);
    assert_eq!(Request::parse(golden[..].try_into().unwrap()), Ok(request));
    for (outcome, golden) in [
        (Outcome::Data(4096), "01000000 00100000 0000000000000000"),
        (Outcome::Done, "02000000 00000000 0000000000000000"),
        (Outcome::OutOfBounds, "03000000 00000000 0000000000000000"),
        (Outcome::WrongEpoch(6), "04000000 00000000 0600000000000000"),
        (Outcome::NoRight, "05000000 00000000 0000000000000000"),
        (Outcome::Failed, "06000000 00000000 0000000000000000"),
    ] {
        let reply = Reply { id: 1, outcome };
        let golden = bytes(&format!("0100000000000000 {golden}"));
        assert_eq!(reply.encode(), golden[..], "{outcome:?}");
        assert_eq!(Reply::parse(golden[..].try_into().unwrap()), Ok(reply));
    }
}

#[test]
fn refusals_have_their_codes_for_ever() {
    let codes = Refusal::ALL.map(Refusal::code);
    assert_eq!(codes, [1, 2, 3, 4, 5]);
    assert_eq!(Refusal::from_code(0), None);
    assert_eq!(Refusal::from_code(6), None);
}

/// What happens to a good message when one field of it is changed.
#[test]
fn wrong_fields_of_a_hello() {
    let good = hello().encode();
    let field = |field, value| FrameError::Field { field, value };
    for (at, width, value, error) in [
        (0, 1, 0, FrameError::Magic),
        (8, 2, 2, FrameError::Version(2)),
        (10, 2, 1, field("kind", 1)),
        (10, 2, 3, field("payload", 0)),
        (12, 2, 3, field("access", 3)),
        (14, 2, 0, field("number of proofs", 0)),
        (14, 2, 129, field("number of proofs", 129)),
        (14, 2, 3, FrameError::Length(112)),
        (16, 8, 0, field("epoch", 0)),
        (24, 4, 1, field("payload", 1)),
        (24, 4, 4097, field("payload", 4097)),
        (28, 4, 1, field("reserved bytes", 1)),
        (36, 4, 3, field("right", 3)),
        (36, 4, 2, field("proof out of order, of region", 3)),
        (72, 4, 2, field("proof out of order, of region", 2)),
    ] {
        let mut bytes = good.clone();
        bytes[at..at + width].copy_from_slice(&u64::to_le_bytes(value)[..width]);
        assert_eq!(Hello::parse(&bytes), Err(error), "{value} at {at}");
    }
}

#[test]
fn wrong_fields_of_an_answer_and_a_greeting() {
    let good = Answer::Welcome {
        epoch: 5,
        regions: vec![grant(3, true, true), grant(4, true, false)],
        payload: Vec::new(),
    };
    let good = good.encode();
    let field = |field, value| FrameError::Field { field, value };
    for (at, width, value, error) in [
        (10, 2, 2, field("kind", 2)),
        (12, 4, 65, field("number of regions", 65)),
        (12, 4, 1, FrameError::Length(64)),
        (16, 8, 0, field("epoch", 0)),
        (24, 4, 1, FrameError::Length(64)),
        (28, 4, 1, field("reserved bytes", 1)),
        (36, 4, 8, field("region flags", 8)),
        (36, 4, 1, field("region flags", 1)),
        (40, 8, 0, field("region length", 0)),
        (40, 8, 2 * MIB + 1, field("region length", 2 * MIB + 1)),
        (48, 4, 3, field("region out of order", 3)),
    ] {
        let mut bytes = good.clone();
        bytes[at..at + width].copy_from_slice(&u64::to_le_bytes(value)[..width]);
        assert_eq!(Answer::parse(&bytes), Err(error), "{value} at {at}");
    }
    let greeting = Greeting {
        epoch: 1,
        nonce: [3; 32],
    };
    for at in [0, 8, 10, 12, 16, 56, 63] {
        let mut bytes = greeting.encode();
        bytes[at] ^= 0x81;
        let parsed = Greeting::parse(&bytes);
        assert!(parsed.is_err() || at == 16, "{at}: {parsed:?}");
    }
    assert!(Greeting::parse(&greeting.encode()[..63]).is_err());
}

#[test]
fn wrong_fields_of_data() {
    let request = Request {
        id: 1,
        way: Way::Read,
        region: RegionId(0),
        offset: 0,
        len: MAX_REQUEST_BYTES as u32,
    };
    for (at, value) in [
        (0, 0),
        (8, 0),
        (8, 3),
        (24, MAX_REQUEST_BYTES as u32 + 1),
        (28, 1),
    ] {
        let mut bytes = request.encode();
        bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
        assert!(Request::parse(&bytes).is_err(), "{value} at {at}");
    }
    let reply = |outcome| Reply { id: 1, outcome }.encode();
    for (outcome, at, value) in [
        (Outcome::Data(1), 0, 0),
        (Outcome::Data(1), 8, 7),
        (Outcome::Data(1), 12, MAX_REQUEST_BYTES as u32 + 1),
        (Outcome::Data(1), 16, 1),
        (Outcome::Done, 12, 1),
        (Outcome::Done, 16, 1),
        (Outcome::WrongEpoch(1), 16, 0),
        (Outcome::WrongEpoch(1), 12, 1),
    ] {
        let mut bytes = reply(outcome);
        bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
        assert!(
            Reply::parse(&bytes).is_err(),
            "{outcome:?}: {value} at {at}"
        );
    }
}

fn any_hello() -> impl Strategy<Value = Hello> {
    let proofs =
        prop::collection::btree_map((any::<u32>(), any::<bool>()), any::<[u8; 32]>(), 1..=128);
    let payload = prop::collection::vec(any::<u8>(), 0..200);
    (proofs, payload, any::<bool>(), 1..=u64::MAX).prop_map(|(proofs, payload, write, epoch)| {
        Hello {
            purpose: if payload.is_empty() {
                Purpose::Data
            } else {
                Purpose::Verbs(payload)
            },
            access: if write {
                Access::ReadWrite
            } else {
                Access::Read
            },
            epoch,
            proofs: proofs
                .into_iter()
                .map(|((region, write), proof)| {
                    let right = if write { Right::Write } else { Right::Read };
                    (RegionId(region), right, Proof(proof))
                })
                .collect(),
        }
    })
}

proptest! {
    #[test]
    fn hellos_go_there_and_back(hello in any_hello(), cut in any::<prop::sample::Index>()) {
        let bytes = hello.encode();
        prop_assert!(bytes.len() <= MAX_HELLO_LEN_BYTES);
        prop_assert_eq!(Hello::len(&bytes[..HEAD_LEN_BYTES]), Ok(bytes.len()));
        prop_assert_eq!(Hello::parse(&bytes), Ok(hello));
        prop_assert!(Hello::parse(&bytes[..cut.index(bytes.len())]).is_err());
    }

    #[test]
    fn what_is_parsed_encodes_to_the_same(
        good in any_hello(),
        flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
    ) {
        let mut bytes = good.encode();
        for (at, value) in flips {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        if let Ok(hello) = Hello::parse(&bytes) {
            prop_assert_eq!(hello.encode(), bytes);
        }
    }

    #[test]
    fn any_bytes_are_taken(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _parsed = (Greeting::parse(&bytes), Hello::parse(&bytes), Answer::parse(&bytes));
        if let Some(Ok(request)) = bytes.first_chunk().map(Request::parse) {
            prop_assert_eq!(&request.encode()[..], &bytes[..data::REQUEST_LEN_BYTES]);
        }
        if let Some(Ok(reply)) = bytes.first_chunk().map(Reply::parse) {
            prop_assert_eq!(&reply.encode()[..], &bytes[..data::REPLY_LEN_BYTES]);
        }
    }
}
