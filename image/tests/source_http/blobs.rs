//! Blobs: broken connections, ranges, wrong bytes, readers that leave.

use std::{
    io::Read,
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use harbour_image::source::{BlobError, ErrorKind, SourceError, SourceOptions};

use crate::{
    fixture::{Image, noise, ranged},
    open, options, pull, read,
    server::{Reply, Request, Server},
};

/// An honest registry but for the layers, which `layer` answers about; it gets the layer, the
/// request, and how many came before.
fn registry(
    image: &Image,
    layer: impl Fn(&[u8], &Request, usize) -> Reply + Send + Sync + 'static,
) -> Server {
    let own = image.clone();
    Server::start(move |request, before| {
        let name = request.path.rsplit('/').next().unwrap();
        let is_it = |blob: &&Vec<u8>| harbour_image::digest::Digest::of(blob).to_string() == name;
        match own.layers.iter().find(is_it) {
            Some(blob) => layer(blob, request, before),
            None => own.answer(request),
        }
    })
}

async fn error(server: &Server, options: &SourceOptions) -> BlobError {
    let source = open(server, options).await;
    let image = source.resolve(None).await.unwrap();
    read(&source, &image.layers[0]).await.unwrap_err()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broken_transfer_goes_on_where_it_stopped() {
    let image = Image::new("amd64", 1, 3_000_000);
    let len = image.layers[0].len();
    // Every answer breaks off after a third of what is left, more often than tries are allowed.
    let server = registry(&image, move |blob, request, before| {
        let left = len - request.range_start().unwrap_or(0);
        let reply = ranged(blob, request);
        if before < 12 {
            reply.cut_at(left / 3)
        } else {
            reply
        }
    });
    pull(&server, &image, &options()).await;
    let starts: Vec<Option<usize>> = server
        .seen()
        .iter()
        .filter(|r| r.path.contains("/blobs/"))
        .map(Request::range_start)
        .skip(1)
        .collect();
    assert_eq!(starts.len(), 13);
    assert_eq!(starts[..2], [None, Some(len / 3)]);
    assert!(
        starts.windows(2).all(|pair| pair[0] < pair[1]),
        "{starts:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_knows_no_ranges_is_read_from_the_start_again() {
    let image = Image::new("amd64", 1, 1_000_000);
    let server = registry(&image, |blob, _, before| {
        let reply = Reply::new(200, blob);
        if before < 3 {
            reply.cut_at(200_000 * (before + 1))
        } else {
            reply
        }
    });
    pull(&server, &image, &options()).await;
    assert_eq!(
        server
            .seen_at(&harbour_image::digest::Digest::of(&image.layers[0]).to_string())
            .len(),
        4
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn parts_that_were_not_asked_for_are_refused() {
    let image = Image::new("amd64", 1, 100_000);
    let len = image.layers[0].len();
    for (range, why) in [
        (format!("bytes 0-{}/{len}", len - 1), "asked for bytes from"),
        (format!("bytes 5000-{}/{}", len, len + 1), "descriptor says"),
        ("nonsense".to_owned(), "the part"),
        (String::new(), "without saying which"),
    ] {
        let server = registry(&image, move |blob, request, _| {
            match request.range_start() {
                None => Reply::new(200, blob).cut_at(5000),
                Some(start) if range.is_empty() => Reply::new(206, &blob[start..]),
                Some(start) => Reply::new(206, &blob[start..]).with("Content-Range", range.clone()),
            }
        });
        let error = error(&server, &options()).await;
        assert!(error.cause().to_string().contains(why), "{}", error.cause());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_bytes_are_told_by_digest_and_size() {
    let image = Image::new("amd64", 1, 100_000);
    let wrong = |change: fn(&mut Vec<u8>)| {
        registry(&image, move |blob, _, _| {
            let mut blob = blob.to_vec();
            change(&mut blob);
            Reply::new(200, blob)
        })
    };
    // The last byte is gzip's own length, which a decompressor need not look at.
    let server = wrong(|blob| *blob.last_mut().unwrap() ^= 1);
    let error = error(&server, &options()).await;
    assert!(
        matches!(error.cause(), SourceError::WrongDigest { .. }),
        "{:?}",
        error
    );
    assert_eq!(
        (error.kind(), error.digest()),
        (
            ErrorKind::Corrupt,
            harbour_image::digest::Digest::of(&image.layers[0])
        )
    );
    let server = wrong(|blob| blob.push(0));
    let longer = self::error(&server, &options()).await;
    assert!(
        matches!(longer.cause(), SourceError::WrongSize { .. }),
        "{:?}",
        longer
    );
    let server = wrong(|blob| blob.truncate(blob.len() - 1));
    let shorter = self::error(&server, &options()).await;
    assert!(
        matches!(shorter.cause(), SourceError::WrongSize { .. }),
        "{:?}",
        shorter
    );
    // Without a length the blob ends where its descriptor says, whatever follows.
    pull(
        &registry(&image, |blob, _, _| Reply::new(200, blob).endless()),
        &image,
        &options(),
    )
    .await;
    let missing = registry(&image, |_, _, _| Reply::new(404, ""));
    assert_eq!(
        self::error(&missing, &options()).await.kind(),
        ErrorKind::Gone
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_without_a_length_that_ends_early_is_asked_for_again_and_then_given_up() {
    let image = Image::new("amd64", 1, 100_000);
    let server = registry(&image, |blob, _, _| {
        let mut raw = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n".to_vec();
        raw.extend_from_slice(&blob[..1000]);
        Reply::raw(raw)
    });
    let error = error(&server, &options()).await;
    assert_eq!(error.kind(), ErrorKind::Retry);
    let requests = server
        .seen()
        .iter()
        .filter(|r| r.range_start() == Some(1000))
        .count();
    assert!((4..=5).contains(&requests), "{requests}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_stops_early_still_learns_of_wrong_bytes() {
    let image = Image::new("amd64", 1, 2_000_000);
    let server = registry(&image, |blob, _, _| {
        let mut blob = blob.to_vec();
        *blob.last_mut().unwrap() ^= 1;
        Reply::new(200, blob)
    });
    let source = open(&server, &options()).await;
    let resolved = source.resolve(None).await.unwrap();
    let mut reader = source.blob(&resolved.layers[0]);
    let end = tokio::task::spawn_blocking(move || {
        reader.read_exact(&mut [0; 100]).unwrap();
        reader.finish()
    });
    let error = end.await.unwrap().unwrap_err();
    assert!(
        matches!(error.cause(), SourceError::WrongDigest { .. }),
        "{error:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_decompressor_passes_the_typed_error_on() {
    let image = Image::new("amd64", 1, 500_000);
    let server = registry(&image, |blob, _, _| Reply::new(200, blob).cut_at(100_000));
    let mut options = options();
    options.retry.resumes = 0;
    let source = open(&server, &options).await;
    let resolved = source.resolve(None).await.unwrap();
    let reader = source.blob(&resolved.layers[0]);
    let result = tokio::task::spawn_blocking(move || {
        std::io::copy(
            &mut flate2::bufread::MultiGzDecoder::new(reader),
            &mut std::io::sink(),
        )
    });
    let error = result.await.unwrap().unwrap_err();
    assert!(BlobError::from_io(&error).is_some(), "{error:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn dropping_the_reader_stops_the_transfer() {
    let mut image = Image::new("amd64", 1, 1000);
    // A blob far larger than every buffer on the way.
    let blob = noise(7, 64 << 20);
    let own = image.clone();
    let text = String::from_utf8(own.manifest).unwrap();
    let old = harbour_image::digest::Digest::of(&own.layers[0]).to_string();
    let new = harbour_image::digest::Digest::of(&blob).to_string();
    let size = |len: usize| format!("\"size\":{len}");
    image.manifest = text
        .replace(&old, &new)
        .replace(&size(own.layers[0].len()), &size(blob.len()))
        .into_bytes();
    image.layers = vec![blob];
    let server = registry(&image, |blob, _, _| Reply::new(200, blob));
    let source = open(&server, &options()).await;
    let resolved = source.resolve(None).await.unwrap();
    let mut reader = source.blob(&resolved.layers[0]);
    let reader = tokio::task::spawn_blocking(move || {
        reader.read_exact(&mut [0; 100_000]).unwrap();
        reader
    });
    drop(reader.await.unwrap());
    let start = Instant::now();
    while server.broken.load(Ordering::SeqCst) == 0 {
        assert!(
            start.elapsed() < Duration::from_secs(10),
            "the server is still sending"
        );
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn slow_servers_meet_the_deadlines_of_a_blob() {
    let image = Image::new("amd64", 1, 200_000);
    let stalled = registry(&image, |blob, request, _| {
        let reply = ranged(blob, request);
        let at = reply.body.len().min(10);
        reply.stalled(at, Duration::from_secs(15))
    });
    let mut options = options();
    options.deadlines.read = Duration::from_millis(100);
    options.deadlines.blob = Duration::from_millis(1500);
    options.deadlines.blob_rate = 1 << 30;
    options.retry.attempts = 1000;
    let start = Instant::now();
    let error = error(&stalled, &options).await;
    assert!(
        error.cause().to_string().contains("complete blob"),
        "{}",
        error.cause()
    );
    assert!(
        start.elapsed() < Duration::from_secs(6),
        "{:?}",
        start.elapsed()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn many_layers_at_once() {
    let image = Image::new("amd64", 12, 300_000);
    let server = registry(&image, |blob, request, before| {
        let reply = ranged(blob, request);
        if before == 0 {
            reply.cut_at(100_000)
        } else {
            reply
        }
    });
    let source = open(&server, &options()).await;
    let resolved = source.resolve(None).await.unwrap();
    let reads = resolved.layers.iter().map(|layer| {
        let (source, layer) = (source.clone(), layer.clone());
        tokio::spawn(async move { read(&source, &layer).await })
    });
    for (read, want) in reads.collect::<Vec<_>>().into_iter().zip(&image.layers) {
        assert!(&read.await.unwrap().unwrap() == want);
    }
}
