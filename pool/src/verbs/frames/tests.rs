use proptest::prelude::*;

use super::*;

fn end() -> End {
    End {
        number: 0x01_0203,
        psn: 0x0a_0b0c,
        mtu: 5,
        reads: 16,
        gid: *b"\0\0\0\0\0\0\0\0\0\0\xff\xff\x0a\x07\0\x02",
        peer_gid: *b"\0\0\0\0\0\0\0\0\0\0\xff\xff\x0a\x07\0\x01",
    }
}

fn answer() -> Answer {
    let key = |region, key, address| RemoteKey {
        region: RegionId(region),
        key,
        address,
    };
    Answer {
        end: end(),
        keys: vec![
            key(0, 0x1122, 0x7f00_0000_1000),
            key(7, 0x3344, 0x7f00_2000_0000),
        ],
    }
}

const HEAD: &str = "485242525652420001000100030201000c0b0a0005100000\
                    00000000000000000000ffff0a07000200000000000000000000ffff0a0700010000000000000000";

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn golden_bytes() {
    assert_eq!(hex(&Request(end()).encode()), HEAD);
    let head = HEAD
        .replacen("01000100", "01000200", 1)
        .replacen("05100000", "05100200", 1);
    let keys = "00000000221100000010000000".to_owned()
        + "7f0000"
        + "07000000443300000000002000"
        + "7f0000";
    assert_eq!(hex(&answer().encode()), head + &keys);
    assert_eq!(Request::parse(&Request(end()).encode()), Ok(Request(end())));
    assert_eq!(Answer::parse(&answer().encode()), Ok(answer()));
}

#[test]
fn what_is_wrong_is_said() {
    let request = Request(end()).encode();
    let broken = |at: usize, byte: u8| {
        let mut bytes = request.clone();
        bytes[at] = byte;
        Request::parse(&bytes).unwrap_err().to_string()
    };
    assert_eq!(broken(0, 0), "a message without the magic number");
    assert_eq!(broken(8, 2), "protocol version 2, this is 1");
    assert_eq!(broken(10, 2), "kind 2");
    assert_eq!(broken(15, 1), "number of a queue pair 16843267");
    assert_eq!(broken(19, 1), "first packet number 17435404");
    assert_eq!(broken(20, 0), "largest packet 0");
    assert_eq!(broken(20, 6), "largest packet 6");
    assert_eq!(broken(21, 0), "reads at one time 0");
    assert_eq!(broken(22, 1), "number of keys 1");
    assert_eq!(broken(63, 1), "reserved bytes 72057594037927936");
    assert_eq!(Request::parse(&request[..63]), Err(FrameError::Length(63)));
    assert_eq!(Request::parse(&[]), Err(FrameError::Length(0)));
    let long = [request.as_slice(), &[0]].concat();
    assert_eq!(Request::parse(&long), Err(FrameError::Length(65)));

    let mut twice = answer();
    twice.keys[1].region = RegionId(0);
    assert!(Answer::parse(&twice.encode()).is_err());
    let mut nowhere = answer();
    nowhere.keys[0].address = 0;
    assert!(Answer::parse(&nowhere.encode()).is_err());
    let mut many = answer();
    many.keys = (0..65)
        .map(|id| RemoteKey {
            region: RegionId(id),
            key: 1,
            address: 1,
        })
        .collect();
    assert!(Answer::parse(&many.encode()).is_err());
    many.keys.pop();
    assert_eq!(many.encode().len(), MAX_ANSWER_LEN_BYTES);
    assert_eq!(Answer::parse(&many.encode()), Ok(many));
}

#[test]
fn keys_do_not_show() {
    let text = format!("{:?}", answer());
    assert!(!text.contains("4386") && !text.contains("13124"), "{text}");
}

proptest! {
    #[test]
    fn parsers_accept_only_what_encoders_give(
        begin in any::<bool>(), mut bytes in prop::collection::vec(any::<u8>(), 0..200),
        at in 0..64_usize, byte in any::<u8>(),
    ) {
        if begin {
            let good = if byte % 2 == 0 { answer().encode() } else { Request(end()).encode() };
            let len = good.len().min(bytes.len());
            bytes = good;
            if len > 100 { bytes[at] = byte; }
        }
        if let Ok(request) = Request::parse(&bytes) {
            prop_assert_eq!(request.encode(), bytes.clone());
        }
        if let Ok(answer) = Answer::parse(&bytes) {
            prop_assert_eq!(answer.encode(), bytes);
        }
    }
}
