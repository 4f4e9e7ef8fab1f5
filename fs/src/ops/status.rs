//! Pages under `.status`, made when they are looked at.

use std::{collections::HashMap, sync::Arc, time::Duration};

use harbour_image::tree::Time;
use serde::Serialize;

use super::{Fs, Made, now};
use crate::{control::Status, view::Shows};

/// A page younger than this is shown again, so that its length fits what is read.
const FRESH: Duration = Duration::from_millis(500);

/// The last page of each kind.
#[derive(Debug, Default)]
pub(super) struct Pages(HashMap<Status, (Made, Time, Arc<[u8]>)>);

/// One view, as `views.json` shows it.
#[derive(Debug, Serialize)]
struct ViewLine {
    number: u32,
    name: Option<String>,
    shows: String,
    layer: bool,
    held: bool,
    open: bool,
    inodes: Option<u64>,
    erofs_bytes: Option<u64>,
    read_bytes: u64,
}

impl Fs {
    /// A page and when it was made.
    pub(super) fn page(&self, kind: Status) -> (Arc<[u8]>, Time) {
        if let Some((made, time, page)) = self.pages.lock().0.get(&kind)
            && made.elapsed() < FRESH
        {
            return (Arc::clone(page), *time);
        }
        let page = self.make_page(kind);
        let time = now();
        self.pages
            .lock()
            .0
            .insert(kind, (Made::now(), time, Arc::clone(&page)));
        (page, time)
    }

    /// The page whose length was told last, whatever its age.
    pub(super) fn page_as_seen(&self, kind: Status) -> Arc<[u8]> {
        let seen = self
            .pages
            .lock()
            .0
            .get(&kind)
            .map(|(.., page)| Arc::clone(page));
        seen.unwrap_or_else(|| self.page(kind).0)
    }

    fn make_page(&self, kind: Status) -> Arc<[u8]> {
        let json = match kind {
            Status::Status => serde_json::to_vec_pretty(&self.stats()),
            Status::Views => serde_json::to_vec_pretty(&self.view_lines()),
        };
        let mut page = json.unwrap_or_else(|error| error.to_string().into_bytes());
        page.push(b'\n');
        page.into()
    }

    fn view_lines(&self) -> Vec<ViewLine> {
        let lines = self.views.all().into_iter().map(|view| {
            let header = view.header_if_open();
            ViewLine {
                number: view.number,
                name: self.view_name(view.number),
                shows: view.shows.to_string(),
                layer: matches!(view.shows, Shows::Layer(_)),
                held: view.is_held(),
                open: header.is_some(),
                inodes: header.map(|header| header.inodes),
                erofs_bytes: header.map(|header| header.erofs_len()),
                read_bytes: view.read_bytes.load(std::sync::atomic::Ordering::Relaxed),
            }
        });
        lines.collect()
    }
}
