//! Invariant of layer decode, for any bytes whatever: it ends without a panic; either with an
//! error that names the layer, or with a tree that keeps every promise of its documentation and
//! whose content, names and counts stay within the limits given.

use harbour_image::{
    decode::{
        Compression, DecodeLimits, DecodeOptions, MemorySink, check::check_tree, decode_layer,
    },
    digest::Digest,
};

const BLOCK: usize = 512;

/// Small, so that going beyond one is within the fuzzer's reach.
const LIMITS: DecodeLimits = DecodeLimits {
    entries_max: 2000,
    tar_bytes_max: 4 << 20,
    file_bytes_max: 1 << 40,
    logical_bytes_max: 1 << 41,
    ratio_max: 500,
    ratio_free_bytes: 1 << 20,
    extension_bytes_max: 64 << 10,
    tree_bytes_max: 2 << 20,
    sparse_segments_max: 500,
    zstd_window_log_max: 20,
};

/// The first byte chooses compression (two bits), whether absolute names are stripped, and
/// whether checksums of headers are made right first, so that changed headers get past them; the
/// rest is the blob.
pub fn check(data: &[u8]) {
    let Some((&mode, blob)) = data.split_first() else {
        return;
    };
    let compression = match mode & 3 {
        0 | 1 => Compression::None,
        2 => Compression::Gzip,
        _ => Compression::Zstd,
    };
    let mut blob = blob.to_vec();
    if mode & 8 != 0 {
        blob.chunks_exact_mut(BLOCK).for_each(seal);
    }
    let options = DecodeOptions {
        label: "fuzz".to_owned(),
        compression,
        diff_id: None,
        limits: LIMITS,
        strip_absolute: mode & 4 != 0,
    };
    let bytes_max = 16 << 20;
    let mut sink = MemorySink::with_bytes_max(bytes_max);
    let decoded = match decode_layer(&blob[..], &options, &mut sink) {
        Ok(decoded) => decoded,
        Err(error) => {
            let text = error.to_string();
            assert!(text.starts_with("layer fuzz"), "{text}");
            assert!(text.len() < 4000, "{} bytes of message", text.len());
            return;
        }
    };
    check_tree(&decoded.tree, |key| sink.object(key).map(<[u8]>::len)).unwrap_or_else(|fault| {
        panic!("{fault}");
    });
    let stats = &decoded.stats;
    assert!(decoded.tree.nodes.len() as u64 <= LIMITS.entries_max + 1);
    assert_eq!(stats.blob_bytes, blob.len() as u64);
    assert!(stats.tar_bytes <= LIMITS.tar_bytes_max);
    assert!(stats.logical_bytes <= LIMITS.logical_bytes_max);
    assert_eq!(stats.objects, sink.len() as u64);
    if compression == Compression::None {
        assert_eq!(decoded.diff_id, Digest::of(&blob));
    }
}

/// Writes the right checksum into what looks like a header.
fn seal(block: &mut [u8]) {
    if &block[257..262] == b"ustar" {
        block[148..156].fill(b' ');
        let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    }
}
