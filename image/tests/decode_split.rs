//! A stream that was taken apart is the same when it is put together again.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "decode_support/support.rs"]
mod support;

use harbour_image::{
    decode::{
        DecodeErrorKind, DecodeOptions,
        split::{Piece, split_layer},
    },
    digest::Digest,
};
use support::*;

fn stream() -> Vec<u8> {
    let long = "d/".to_owned() + &"n".repeat(200);
    let big = vec![7; 700_001];
    Tar::new()
        .dir("./d/", 0o755)
        .with_data(
            Head {
                name: b"d/f",
                ..Head::default()
            },
            b"hello",
        )
        .symlink("l", "d/f")
        .with_data(
            Head {
                name: b"empty",
                ..Head::default()
            },
            b"",
        )
        .with_data(
            Head {
                name: long.as_bytes().get(..90).unwrap(),
                ..Head::default()
            },
            &big,
        )
        .end()
}

#[test]
fn pieces_are_the_stream() {
    let mut tar = stream();
    // Archives of GNU tar end with more blocks of zeros than two, and who knows what.
    tar.extend([0; 10_240]);
    tar.extend(b"behind the end");
    let options = DecodeOptions {
        diff_id: Some(Digest::of(&tar)),
        ..DecodeOptions::default()
    };
    let (mut whole, mut entries) = (Vec::new(), Vec::new());
    let diff_id = split_layer(&tar[..], &options, &mut |piece| {
        match piece {
            Piece::Around(bytes) => whole.extend_from_slice(bytes),
            Piece::Entry { name, len } => entries.push((name.to_owned(), len, Vec::new())),
            Piece::Content(bytes) => {
                whole.extend_from_slice(bytes);
                entries.last_mut().unwrap().2.extend_from_slice(bytes);
            }
        }
        Ok(())
    })
    .unwrap();
    assert_eq!(diff_id, Digest::of(&tar));
    assert!(whole == tar);
    let found: Vec<_> = entries
        .iter()
        .map(|(name, len, content)| {
            assert_eq!(*len, content.len() as u64);
            (String::from_utf8_lossy(name).len(), *len)
        })
        .collect();
    assert_eq!(found, [(4, 0), (3, 5), (1, 0), (5, 0), (90, 700_001)]);
}

#[test]
fn what_takes_pieces_may_end_it() {
    let tar = stream();
    let error = split_layer(&tar[..], &DecodeOptions::default(), &mut |_| {
        Err("enough".into())
    });
    assert!(
        error
            .unwrap_err()
            .to_string()
            .contains("could not be placed")
    );
    let wrong = DecodeOptions {
        diff_id: Some(Digest::of(b"other")),
        ..DecodeOptions::default()
    };
    let error = split_layer(&tar[..], &wrong, &mut |_| Ok(())).unwrap_err();
    assert!(matches!(error.kind(), DecodeErrorKind::DiffId { .. }));
}
