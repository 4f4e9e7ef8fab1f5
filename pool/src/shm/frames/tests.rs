#![allow(clippy::unwrap_used, clippy::expect_used)]

use proptest::prelude::*;

use super::*;

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

#[test]
fn golden_hello() {
    let token = Token(std::array::from_fn(|at| at as u8));
    let hello = Hello {
        access: Access::ReadWrite,
        epoch: 0x1122_3344_5566_7788,
        token,
    };
    let golden = bytes(
        "4852425253484d00 0200 0200 00000000 8877665544332211
         000102030405060708090a0b0c0d0e0f 101112131415161718191a1b1c1d1e1f 0000000000000000",
    );
    assert_eq!(hello.encode(), golden[..]);
    assert_eq!(Hello::parse(&golden), Ok(hello));
}

#[test]
fn golden_answers() {
    let regions = vec![
        RegionInfo {
            id: RegionId(0),
            len: 2 * MIB,
            huge_pages: true,
        },
        RegionInfo {
            id: RegionId(7),
            len: 1 << 40,
            huge_pages: false,
        },
    ];
    for (answer, golden) in [
        (
            Answer::Welcome {
                epoch: 5,
                regions: regions.clone(),
            },
            "4852425253484d00 0200 0100 02000000 0500000000000000 0000000000000000
             00000000 01000000 0000200000000000
             07000000 00000000 0000000000010000",
        ),
        (
            Answer::WrongEpoch { actual: u64::MAX },
            "4852425253484d00 0200 0200 00000000 ffffffffffffffff 0000000000000000",
        ),
        (
            Answer::Refused(Refusal::Busy),
            "4852425253484d00 0200 0300 05000000 0000000000000000 0000000000000000",
        ),
        (
            Answer::Revoked { epoch: 258 },
            "4852425253484d00 0200 0400 00000000 0201000000000000 0000000000000000",
        ),
        (
            Answer::Retired {
                epoch: 5,
                regions: vec![RegionId(1), RegionId(258)],
            },
            "4852425253484d00 0200 0500 02000000 0500000000000000 0000000000000000
             01000000 02010000",
        ),
        (
            Answer::Added { epoch: 5, regions },
            "4852425253484d00 0200 0600 02000000 0500000000000000 0000000000000000
             00000000 01000000 0000200000000000
             07000000 00000000 0000000000010000",
        ),
    ] {
        let golden = bytes(golden);
        assert_eq!(answer.encode(), golden, "{answer:?}");
        assert_eq!(Answer::parse(&golden), Ok(answer));
    }
}

#[test]
fn refusals_have_their_codes_for_ever() {
    for (code, refusal) in [
        (1, Refusal::Malformed),
        (2, Refusal::Version),
        (3, Refusal::Access),
        (4, Refusal::Token),
        (5, Refusal::Busy),
    ] {
        assert_eq!(Answer::Refused(refusal).encode()[12..16], [code, 0, 0, 0]);
    }
}

/// What happens to a good message when one field of it is changed.
#[test]
fn wrong_fields() {
    let region = RegionInfo {
        id: RegionId(3),
        len: 4 * MIB,
        huge_pages: false,
    };
    let second = RegionInfo {
        id: RegionId(4),
        ..region
    };
    let welcome = Answer::Welcome {
        epoch: 5,
        regions: vec![region, second],
    }
    .encode();
    let revoked = Answer::Revoked { epoch: 5 }.encode();
    let refused = Answer::Refused(Refusal::Token).encode();
    let retired = Answer::Retired {
        epoch: 5,
        regions: vec![RegionId(3), RegionId(4)],
    }
    .encode();
    let field = |field, value| FrameError::Field { field, value };
    for (message, at, value, error) in [
        (&welcome, 0, 0_u64, FrameError::Magic),
        (&welcome, 8, 3, FrameError::Version(3)),
        (&welcome, 10, 5, FrameError::Length(64)),
        (&welcome, 10, 7, FrameError::Length(64)),
        (&welcome, 12, 0, field("number of regions", 0)),
        (&welcome, 12, 3, FrameError::Length(64)),
        (&welcome, 12, 65, field("number of regions", 65)),
        (
            &welcome,
            12,
            0xFFFF_FFFF,
            field("number of regions", 0xFFFF_FFFF),
        ),
        (&welcome, 16, 0, field("epoch", 0)),
        (&welcome, 24, 1, field("reserved bytes", 1)),
        (&welcome, 36, 2, field("region flags", 2)),
        (&welcome, 40, 0, field("region length", 0)),
        (
            &welcome,
            40,
            4 * MIB + 1,
            field("region length", 4 * MIB + 1),
        ),
        (&welcome, 40, u64::MAX, field("region length", u64::MAX)),
        (
            &welcome,
            40,
            (1 << 46) + 2 * MIB,
            field("region length", (1 << 46) + 2 * MIB),
        ),
        (&welcome, 48, 3, field("region out of order", 3)),
        (&revoked, 10, 9, field("kind", 9)),
        (&revoked, 12, 1, field("count", 1)),
        (&revoked, 16, 0, field("epoch", 0)),
        (&retired, 12, 0, field("number of regions", 0)),
        (&retired, 12, 65, field("number of regions", 65)),
        (&retired, 12, 1, FrameError::Length(40)),
        (&retired, 16, 0, field("epoch", 0)),
        (&retired, 36, 3, field("region out of order", 3)),
        (&refused, 12, 0, field("reason", 0)),
        (&refused, 12, 6, field("reason", 6)),
        (&refused, 16, 1, field("epoch", 1)),
    ] {
        let mut message = message.clone();
        // As many bytes as the field has, by the layout in the module's head.
        let width = match at {
            0 | 16 | 24 | 40 => 8,
            8 | 10 => 2,
            _ => 4,
        };
        message[at..at + width].copy_from_slice(&value.to_le_bytes()[..width]);
        assert_eq!(Answer::parse(&message), Err(error), "{value} at {at}");
    }
}

#[test]
fn wrong_hellos() {
    let good = Hello {
        access: Access::Read,
        epoch: 0,
        token: Token::NONE,
    }
    .encode();
    for (at, value) in [
        (0, 1),
        (8, 0),
        (9, 1),
        (10, 0),
        (10, 3),
        (12, 1),
        (56, 1),
        (63, 1),
    ] {
        let mut message = good;
        message[at] = value;
        assert!(Hello::parse(&message).is_err(), "{value} at {at}");
    }
    for len in 0..HELLO_LEN_BYTES {
        assert_eq!(Hello::parse(&good[..len]), Err(FrameError::Length(len)));
    }
    let long = [&good[..], &[0]].concat();
    assert_eq!(Hello::parse(&long), Err(FrameError::Length(65)));
}

#[test]
fn tokens_keep_quiet() {
    assert!(Token::NONE.matches(&Token::NONE));
    assert!(!Token([1; 32]).matches(&Token::NONE));
    assert_eq!(
        format!("{:?} {:?}", Token::NONE, Token([65; 32])),
        "Token::NONE Token(…)"
    );
}

fn any_answer() -> impl Strategy<Value = Answer> {
    let region = (1..=MAX_REGION_BYTES / REGION_ALIGN_BYTES, any::<bool>());
    let regions = prop::collection::btree_map(any::<u32>(), region, 1..=MAX_REGIONS);
    let ids = prop::collection::btree_set(any::<u32>(), 1..=MAX_REGIONS);
    let region = |(id, (units, huge_pages))| RegionInfo {
        id: RegionId(id),
        len: units * REGION_ALIGN_BYTES,
        huge_pages,
    };
    let refusal = (1..=5_u32).prop_map(|code| Refusal::from_code(code).unwrap());
    prop_oneof![
        (1_u64.., regions, any::<bool>()).prop_map(move |(epoch, regions, first)| {
            let regions = regions.into_iter().map(region).collect();
            if first {
                Answer::Welcome { epoch, regions }
            } else {
                Answer::Added { epoch, regions }
            }
        }),
        (1_u64.., ids).prop_map(|(epoch, ids)| Answer::Retired {
            epoch,
            regions: ids.into_iter().map(RegionId).collect()
        }),
        (1_u64..).prop_map(|actual| Answer::WrongEpoch { actual }),
        refusal.prop_map(Answer::Refused),
        (1_u64..).prop_map(|epoch| Answer::Revoked { epoch }),
    ]
}

proptest! {
    #[test]
    fn answers_come_back(answer in any_answer()) {
        let bytes = answer.encode();
        prop_assert!(bytes.len() <= MAX_ANSWER_LEN_BYTES);
        prop_assert_eq!(Answer::parse(&bytes), Ok(answer));
    }

    #[test]
    fn hellos_come_back(write: bool, epoch: u64, token: [u8; 32]) {
        let access = if write { Access::ReadWrite } else { Access::Read };
        let hello = Hello { access, epoch, token: Token(token) };
        prop_assert_eq!(Hello::parse(&hello.encode()), Ok(hello));
    }

    /// Damaged messages are refused or mean exactly what their bytes say.
    #[test]
    fn damage_shows(answer in any_answer(), at: prop::sample::Index, bit in 0..8_u8, cut: prop::sample::Index) {
        let mut bytes = answer.encode();
        let at = at.index(bytes.len());
        bytes[at] ^= 1_u8 << bit;
        if let Ok(other) = Answer::parse(&bytes) {
            prop_assert_eq!(other.encode(), bytes.clone());
        }
        let cut = cut.index(bytes.len());
        prop_assert!(Answer::parse(&bytes[..cut]).is_err());
    }
}
