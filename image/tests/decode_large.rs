//! Layers that are large in one way or another.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "decode_support/support.rs"]
mod support;

use std::io::Read;

use harbour_image::{
    decode::{Compression, DecodeLimits, DecodeOptions, MemorySink, decode_layer},
    tree::{Content, Kind, ObjectKey, ObjectSink, Tree},
};
use support::*;

/// Counts what it is given and keeps none of it.
#[derive(Default)]
struct Counter(u64);

impl ObjectSink for Counter {
    type Error = std::convert::Infallible;

    fn put(&mut self, bytes: &[u8]) -> Result<ObjectKey, Self::Error> {
        self.0 += bytes.len() as u64;
        Ok(ObjectKey(0))
    }
}

fn only_file(tree: &Tree) -> &Content {
    let Kind::Dir(root) = &tree.node(Tree::ROOT).kind else {
        panic!()
    };
    let Kind::File(content) = &tree.node(*root.entries.values().next().unwrap()).kind else {
        panic!()
    };
    content
}

#[test]
fn a_directory_of_a_hundred_thousand() {
    let mut tar = Tar::new().dir("d", 0o755);
    for number in 0..100_000u32 {
        // Out of order, so that the tree has to sort.
        let name = format!("d/{:08x}", number.wrapping_mul(2_654_435_761));
        tar = tar.file(&name, &number.to_le_bytes());
    }
    let (decoded, sink) = decode(&tar.end()).unwrap();
    let Kind::Dir(root) = &decoded.tree.node(Tree::ROOT).kind else {
        panic!()
    };
    let Kind::Dir(dir) = &decoded.tree.node(root.entries[&b"d"[..]]).kind else {
        panic!()
    };
    assert_eq!(dir.entries.len(), 100_000);
    let name = format!("{:08x}", 77_777u32.wrapping_mul(2_654_435_761));
    let Kind::File(content) = &decoded.tree.node(dir.entries[name.as_bytes()]).kind else {
        panic!()
    };
    assert_eq!(sink.content(content), 77_777u32.to_le_bytes());
}

#[test]
fn a_sparse_file_of_five_gigabytes() {
    let size = 5_u64 << 30;
    let map = format!("4095,3,{},5,{},1", (4_u64 << 30) + 7, size - 1);
    let tar = Tar::new()
        .pax(
            b'x',
            &[
                ("GNU.sparse.size", size.to_string().as_bytes()),
                ("GNU.sparse.map", map.as_bytes()),
                ("GNU.sparse.name", b"big"),
            ],
        )
        .file("GNUSparseFile.1/big", b"abcdefghi")
        .end();
    let (decoded, sink) = decode(&tar).unwrap();
    let content = only_file(&decoded.tree);
    assert_eq!(content.size, size);
    assert_eq!(decoded.stats.logical_bytes, size);
    for (offset, want) in [
        (4094, &b"\0abc\0"[..]),
        ((4 << 30) + 6, b"\0defgh\0"),
        (size - 2, b"\0i\0"),
        (1 << 30, b"\0\0"),
    ] {
        let mut got = vec![1; want.len()];
        sink.read_at(content, offset, &mut got);
        assert_eq!(got, want, "at {offset}");
    }
}

#[test]
fn a_plain_file_of_more_than_four_gigabytes() {
    // Eight gigabytes need eleven octal digits and a length that no 32 bits hold; a length that
    // the ustar field cannot hold goes through PAX in other tests.
    let size = (4_u64 << 30) + 5;
    let head = Head {
        size,
        ..Head::default()
    };
    let mut end = vec![0; 507];
    end.extend([0; 1024]);
    let pattern = std::io::repeat(b'z').take(size);
    let block = head.block();
    let blob = block.chain(pattern).chain(&end[..]);
    let mut sink = Counter::default();
    let decoded = decode_layer(blob, &options(Compression::None), &mut sink).unwrap();
    let content = only_file(&decoded.tree);
    assert_eq!((content.size, sink.0), (size, size));
    assert_eq!(content.runs.len(), 4097);
    assert_eq!(content.runs[4096].len, 5);
}

#[test]
fn ten_million_entries_are_refused_early() {
    struct Endless<'a>(&'a [u8], usize, u64);
    impl Read for Endless<'_> {
        fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
            let count = into.len().min(self.0.len() - self.1);
            into[..count].copy_from_slice(&self.0[self.1..self.1 + count]);
            self.1 = (self.1 + count) % self.0.len();
            self.2 += count as u64;
            Ok(count)
        }
    }
    let heads: Vec<u8> = (0..1000)
        .fold(Tar::new(), |tar, i| tar.file(&format!("f{i}"), b""))
        .0;
    let limits = DecodeLimits {
        entries_max: 200_000,
        ..Default::default()
    };
    let options = DecodeOptions {
        limits,
        ..options(Compression::None)
    };
    let mut endless = Endless(&heads, 0, 0);
    let error = decode_layer(&mut endless, &options, &mut MemorySink::new()).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("too many entries (limit 200000)"),
        "{error}"
    );
    // Not much more was read than the entries that were taken.
    assert!(endless.2 < 200_000 * 512 + (4 << 20), "{}", endless.2);
}
