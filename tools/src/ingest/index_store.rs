//! Indexes on their way to metad's disk and into the pool, and back.

use std::sync::Arc;

use harbour_image::{
    index::{PackRef, seal::table_len},
    object::{PACK_MAX, PackId},
};
use harbour_metad_client::{Client, Error as ClientError, v1};

use super::{IngestError, lease::Pull};

/// Largest range of an index asked of metad at once, in bytes.
const RANGE: usize = 512 << 10;

/// Largest index that is read whole, in bytes.
const INDEX_MAX: u64 = 4 << 30;

/// Puts an index on metad's disk and, in packs, into the pool.
pub fn store(
    pull: &Pull,
    digest: [u8; 32],
    len: u64,
    bytes: &Arc<[u8]>,
) -> Result<(v1::IndexRef, Vec<PackRef>), IngestError> {
    pull.check()?;
    let put = || {
        let client = pull.client();
        client.put_index(pull.reference(), digest, len, Arc::clone(bytes))
    };
    pull.wait(pull.ask(put))?;
    pull.step("pull.index_put");
    let mut packs = Vec::new();
    for part in bytes.chunks(PACK_MAX) {
        let pack = PackRef {
            id: PackId(*blake3::hash(part).as_bytes()),
            len: part.len() as u32,
        };
        pull.store_pack(&pack, part)?;
        packs.push(pack);
    }
    let reference = v1::IndexRef {
        digest: digest.to_vec(),
        len_bytes: len,
        packs: packs.iter().map(|pack| pack.id.0.to_vec()).collect(),
    };
    Ok((reference, packs))
}

/// The same of something that was in the catalogue a moment ago and may have been removed since: then
/// there is nothing.
pub async fn fetch_if_there(
    client: &Client,
    index: &v1::IndexRef,
    what: &str,
) -> Result<Option<Arc<[u8]>>, IngestError> {
    match fetch(client, index, what).await {
        Err(IngestError::Metad(ClientError::NotFound { .. })) => {
            tracing::debug!(what, "was removed meanwhile");
            Ok(None)
        }
        other => other.map(Some),
    }
}

/// Reads a whole index from metad's disk. The caller opens it with checks: it is not verified here
/// beyond its granule table.
pub async fn fetch(
    client: &Client,
    index: &v1::IndexRef,
    what: &str,
) -> Result<Arc<[u8]>, IngestError> {
    let claimed = index.len_bytes;
    let total = (claimed <= INDEX_MAX)
        .then(|| claimed + table_len(claimed))
        .and_then(|total| usize::try_from(total).ok())
        .ok_or_else(|| IngestError::Limit(format!("index of {what} claims {claimed} bytes")))?;
    let mut bytes = Vec::new();
    while bytes.len() < total {
        let request = v1::ReadIndexRequest {
            digest: index.digest.clone(),
            offset: bytes.len() as u64,
            len: RANGE.min(total - bytes.len()) as u32,
        };
        let part = client.read_index(request).await?.content;
        if part.is_empty() || part.len() > RANGE {
            return Err(IngestError::Bug(format!(
                "metad's copy of the index of {what} is cut short"
            )));
        }
        bytes.extend_from_slice(&part);
    }
    Ok(bytes.into())
}
