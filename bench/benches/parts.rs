//! The parts alone: index, decode, hash, verification, allocator, transport.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::{
    hint::black_box,
    io::{Read as _, Write as _},
    ops::ControlFlow,
    time::{Duration, Instant},
};

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use harbour_bench::{
    content::{Content, Rng, Texture},
    layout, sets,
};
use harbour_image::{
    decode::{self, Compression, DecodeOptions},
    index::{self, Index, PackRef, Placement, ViewKind},
    object::{GRANULE, OBJECT_MAX, PACK_MAX, PackId, hash_object, verify_granule},
    tree::{ObjectKey, ObjectSink},
};
use harbour_metad::space::{Book, Space};
use harbour_pool::{
    donor::{DonorConfig, DonorServer},
    shm::{ShmTransport, frames::Token},
    transport::{Access, Read, Transport as _, Write},
};

const DEADLINE: Duration = Duration::from_secs(10);

/// Takes objects and forgets them: what is left is the decoder.
#[derive(Debug, Default)]
struct Forget(u32);

/// Hashes and places objects as an ingest does, without a pool behind.
#[derive(Debug, Default)]
struct Place {
    placement: Placement,
    filled: u32,
}

#[derive(Debug)]
struct Never;

impl std::fmt::Display for Never {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("too many objects")
    }
}

impl std::error::Error for Never {}

impl ObjectSink for Forget {
    type Error = Never;

    fn put(&mut self, bytes: &[u8]) -> Result<ObjectKey, Never> {
        black_box(bytes.len());
        self.0 += 1;
        Ok(ObjectKey(self.0 - 1))
    }
}

impl ObjectSink for Place {
    type Error = Never;

    fn put(&mut self, bytes: &[u8]) -> Result<ObjectKey, Never> {
        let len = u32::try_from(bytes.len()).map_err(|_| Never)?;
        if self.placement.packs.is_empty() || self.filled + len > PACK_MAX as u32 {
            let number = self.placement.packs.len() as u64;
            let mut id = [0; 32];
            id[..8].copy_from_slice(&number.to_le_bytes());
            self.placement.packs.push(PackRef {
                id: PackId(id),
                len: 0,
            });
            self.filled = 0;
        }
        let pack = self.placement.packs.len() as u32 - 1;
        let offset = self.filled;
        self.filled += len;
        self.placement.packs[pack as usize].len = self.filled;
        self.placement
            .push(&hash_object(bytes), len, pack, offset)
            .ok_or(Never)
    }
}

fn tar_of(entries: &[sets::Entry]) -> Vec<u8> {
    let mut tar = Vec::new();
    layout::write_tar(entries, &mut tar).unwrap();
    tar
}

fn bytes_of(len: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(len);
    Content::new(9, Texture::Random, len as u64)
        .read_to_end(&mut bytes)
        .unwrap();
    bytes
}

/// The index of the metadata set, without the granule table.
fn index_of_50k() -> Vec<u8> {
    let tar = tar_of(&sets::metadata(50_000));
    let mut sink = Place::default();
    let decoded = decode::decode_layer(&tar[..], &DecodeOptions::default(), &mut sink).unwrap();
    let written = index::write(&decoded.tree, &sink.placement, ViewKind::Layer).unwrap();
    let mut bytes = written.bytes;
    bytes.truncate(written.len as usize);
    bytes
}

fn index(c: &mut Criterion) {
    let bytes = index_of_50k();
    let index = Index::open(&bytes[..]).unwrap();
    let mut paths: Vec<String> = sets::metadata(50_000)
        .into_iter()
        .map(|entry| entry.path)
        .collect();
    Rng::new(1).shuffle(&mut paths);
    let mut group = c.benchmark_group("index of 50,000 names");
    group.bench_function("open", |b| {
        b.iter(|| Index::open(black_box(&bytes[..])).unwrap())
    });
    let mut turn = 0;
    group.bench_function("walk a path and read its inode", |b| {
        b.iter(|| {
            turn = (turn + 1) % paths.len();
            let mut inode = index.root().unwrap();
            for name in paths[turn].split('/') {
                let (nid, _) = index.lookup(&inode, name.as_bytes()).unwrap().unwrap();
                inode = index.inode(nid).unwrap();
            }
            inode
        });
    });
    group.throughput(Throughput::Elements(50_000));
    group
        .sample_size(20)
        .bench_function("readdir of everything with inodes", |b| {
            b.iter(|| {
                let mut open = vec![index.root().unwrap()];
                let mut names = 0;
                while let Some(dir) = open.pop() {
                    index
                        .readdir(&dir, 0, |entry| {
                            names += 1;
                            let inode = index.inode(entry.nid).unwrap();
                            if inode.file_type == index::FileType::Dir {
                                open.push(inode);
                            }
                            ControlFlow::Continue(())
                        })
                        .unwrap();
                }
                assert!(names >= 50_000);
                names
            });
        });
    let (from, len) = (index.header().meta_len, index.header().data_len);
    let mut rng = Rng::new(2);
    group.throughput(Throughput::Elements(1));
    group.bench_function("segments of 4 KiB", |b| {
        b.iter(|| {
            index
                .segments(from + rng.below(len / 4096) * 4096, 4096)
                .unwrap()
        });
    });
    group.finish();
}

fn decode(c: &mut Criterion) {
    let tar = tar_of(&sets::image_like(32 << 20, 1));
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::new(6));
    encoder.write_all(&tar).unwrap();
    let gzip = encoder.finish().unwrap();
    let mut group = c.benchmark_group("decode a layer of 32 MiB");
    group
        .sample_size(10)
        .throughput(Throughput::Bytes(tar.len() as u64));
    for (name, blob, compression) in [
        ("tar", &tar, Compression::None),
        ("tar in gzip", &gzip, Compression::Gzip),
    ] {
        let options = DecodeOptions {
            compression,
            ..DecodeOptions::default()
        };
        group.bench_function(name, |b| {
            b.iter(|| decode::decode_layer(&blob[..], &options, &mut Forget::default()).unwrap());
        });
    }
    group.bench_function("tar, hashed and placed", |b| {
        b.iter(|| {
            decode::decode_layer(&tar[..], &DecodeOptions::default(), &mut Place::default())
                .unwrap()
        });
    });
    group.finish();
}

fn objects(c: &mut Criterion) {
    let mut group = c.benchmark_group("object");
    for (name, len) in [
        ("4 KiB", 4 << 10),
        ("10 KiB", 10 << 10),
        ("1 MiB", OBJECT_MAX),
    ] {
        let bytes = bytes_of(len);
        group.throughput(Throughput::Bytes(len as u64));
        group.bench_function(format!("hash {name}"), |b| {
            b.iter(|| hash_object(black_box(&bytes)))
        });
    }
    let bytes = bytes_of(OBJECT_MAX);
    let hashes = hash_object(&bytes);
    group.throughput(Throughput::Bytes(GRANULE as u64));
    group.bench_function("verify a granule", |b| {
        b.iter(|| {
            let granule = &bytes[7 * GRANULE..8 * GRANULE];
            assert!(verify_granule(
                &hashes.id,
                OBJECT_MAX as u32,
                hashes.granules.get(7),
                7,
                black_box(granule)
            ));
        });
    });
    group.finish();
}

/// Space that is nine tenths full and in pieces: what a pool looks like after some weeks.
fn allocator(c: &mut Criterion) {
    const REGION: u64 = 64 << 30;
    let mut rng = Rng::new(3);
    let mut space = Space::new();
    space.add_donor(1, [(0, REGION)]);
    let mut len = move || match rng.below(4) {
        0 => 1 + rng.below(PACK_MAX as u64) as u32,
        _ => PACK_MAX as u32,
    };
    let mut held = Vec::new();
    while space.books().free > REGION / 10 {
        held.push(
            space
                .reserve(harbour_metad::space::Ask {
                    len: len(),
                    ..Default::default()
                })
                .unwrap(),
        );
    }
    let mut pick = Rng::new(4);
    c.bench_function(
        "allocator: free one pack and reserve another of 64 GiB",
        |b| {
            b.iter(|| {
                let old = held.swap_remove(pick.below(held.len() as u64) as usize);
                space.free(&old, Book::Reserved);
                held.push(
                    space
                        .reserve(harbour_metad::space::Ask {
                            len: len(),
                            ..Default::default()
                        })
                        .unwrap(),
                );
            });
        },
    );
    assert!(space.books().balance());
}

fn transport(c: &mut Criterion) {
    const REGION: u64 = 256 << 20;
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("donor.sock");
    let mut config = DonorConfig::new("bench", &socket, REGION);
    config.populate = true;
    let donor = DonorServer::start(config).unwrap();
    let region = donor.regions()[0].id;
    let connect = |access| {
        ShmTransport::connect(&socket, 0, access, Token::NONE, Instant::now() + DEADLINE).unwrap()
    };
    let (reader, writer) = (connect(Access::Read), connect(Access::ReadWrite));
    let mut rng = Rng::new(5);
    let mut group = c.benchmark_group("shm");
    for (name, len) in [("16 KiB", GRANULE), ("1 MiB", 1 << 20)] {
        let mut place = move || rng.below((REGION / len as u64) - 1) * len as u64;
        let mut buffer = vec![0; len];
        group.throughput(Throughput::Bytes(len as u64));
        group.bench_function(format!("read {name}"), |b| {
            b.iter(|| {
                let mut batch = [Read {
                    region,
                    offset: place(),
                    into: &mut buffer,
                }];
                reader.read(&mut batch, Instant::now() + DEADLINE).unwrap();
            });
        });
        rng = Rng::new(6);
    }
    let from = bytes_of(PACK_MAX);
    group.throughput(Throughput::Bytes(PACK_MAX as u64));
    group.bench_function("write a pack of 4 MiB", |b| {
        b.iter_batched(
            || rng.below(REGION / PACK_MAX as u64) * PACK_MAX as u64,
            |offset| {
                writer
                    .write(
                        &[Write {
                            region,
                            offset,
                            from: &from,
                        }],
                        Instant::now() + DEADLINE,
                    )
                    .unwrap()
            },
            BatchSize::SmallInput,
        );
    });
    // The limit of all of these: the same copy inside one process.
    let mut into = vec![0; 1 << 20];
    group.throughput(Throughput::Bytes(1 << 20));
    group.bench_function("memcpy of 1 MiB", |b| {
        b.iter(|| into.copy_from_slice(black_box(&from[..1 << 20])))
    });
    group.finish();
}

criterion_group!(parts, index, decode, objects, allocator, transport);
criterion_main!(parts);
