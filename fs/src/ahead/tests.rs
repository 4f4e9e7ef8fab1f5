#![allow(clippy::unwrap_used)]
use super::*;

fn node(nid: u64) -> Node {
    Node::in_view(7, nid).unwrap()
}

fn ahead() -> (Ahead, Receiver<Job>) {
    let (jobs, queue) = sync_channel(QUEUE);
    let ahead = Ahead {
        jobs,
        windows: Mutex::new(LruCache::new(WINDOWS)),
        listings: Mutex::new(Listings::new()),
    };
    (ahead, queue)
}

fn files(queue: &Receiver<Job>) -> Vec<u64> {
    match queue.try_recv() {
        Ok(Job::Files(files)) => files.iter().map(|(node, _)| node.raw() & 0xff).collect(),
        Ok(Job::Span(..)) => panic!("a span"),
        Err(_) => Vec::new(),
    }
}

fn list(ahead: &Ahead, dir: u64, names: std::ops::Range<u64>, len: u64) {
    let listed: Vec<(Node, u64)> = names.map(|nid| (node(nid), len)).collect();
    let (first, second) = listed.split_at(listed.len() / 2);
    ahead.was_listed(node(dir), 0, first, false);
    ahead.was_listed(node(dir), 5, second, false);
    ahead.was_listed(node(dir), 9, &[], true);
}

#[test]
fn listings_alone_bring_nothing_and_a_read_brings_the_rest() {
    let (ahead, queue) = ahead();
    list(&ahead, 100, 1..11, 10);
    assert!(files(&queue).is_empty());
    ahead.file_read(node(3));
    assert_eq!(files(&queue), [6, 7, 8, 9, 10]);
    // The reader was under way to these, or they came late.
    for nid in [4, 5, 6] {
        ahead.file_read(node(nid));
        assert!(files(&queue).is_empty());
    }
    // From now on whole listings come as they end, until credit runs out.
    for round in 0..CREDIT {
        list(&ahead, 101 + u64::from(round), 20..24, 10);
        assert_eq!(files(&queue), [20, 21, 22, 23], "round {round}");
    }
    list(&ahead, 130, 30..34, 10);
    assert!(files(&queue).is_empty());
    ahead.file_read(node(30));
    assert_eq!(
        files(&queue),
        [33],
        "the one that was left alone shows the way"
    );
    list(&ahead, 131, 40..42, 10);
    assert_eq!(files(&queue), [40, 41]);
}

#[test]
fn what_is_brought_and_remembered_is_bounded() {
    let (ahead, queue) = ahead();
    list(&ahead, 100, 1..101, FILE_MAX);
    ahead.file_read(node(1));
    assert_eq!(files(&queue).len() as u64, LISTING_BYTES / FILE_MAX);
    list(&ahead, 101, 1..3, FILE_MAX + 1);
    list(&ahead, 102, 1..3, 0);
    assert!(files(&queue).is_empty(), "too long, or empty");
    for dir in 0..2 * LISTINGS.get() as u64 {
        let start = 1000 + dir * 1000;
        list(&ahead, dir, start..start + 1000, 1);
    }
    let listings = ahead.listings.lock();
    assert!(listings.places.len() <= LISTED_MAX);
    assert!(listings.dirs.len() <= LISTINGS.get());
    let all = listings.dirs.iter();
    let listed: usize = all.map(|(_, listing)| listing.files.len()).sum();
    assert_eq!((listed, listed), (listings.places.len(), listings.names));
}
