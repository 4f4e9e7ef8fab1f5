//! Which host this is: what tells a donor's socket file on this host from one of the same path on
//! another.

/// The form in which a donor's host appears among its addresses: `"host:"` and its boot ID. Not a
/// place to connect to: who knows nothing of it passes it over.
const PREFIX: &str = "host:";

/// The boot ID of the running kernel; `None` where there is no `/proc`.
pub fn id() -> Option<String> {
    let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    let id = id.trim();
    (!id.is_empty()).then(|| id.to_owned())
}

/// `id` as an entry of a list of addresses.
pub fn address_of(id: &str) -> String {
    format!("{PREFIX}{id}")
}

/// Whether a donor with these addresses may be on the host `id`: it says so, or does not say where
/// it is.
pub fn may_be(id: Option<&str>, addresses: &[String]) -> bool {
    let mut said = addresses
        .iter()
        .filter_map(|address| address.strip_prefix(PREFIX))
        .peekable();
    said.peek().is_none() || said.any(|said| Some(said) == id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_donor_is_here_when_it_says_so_or_says_nothing() {
        let at = |addresses: &[&str]| -> Vec<String> {
            addresses
                .iter()
                .map(|address| (*address).to_owned())
                .collect()
        };
        let here = Some("a");
        assert!(may_be(here, &at(&["shm:/x"])));
        assert!(may_be(here, &at(&["shm:/x", "host:a"])));
        assert!(!may_be(here, &at(&["shm:/x", "host:b"])));
        assert!(!may_be(None, &at(&["shm:/x", "host:b"])));
        assert!(id().is_some_and(|id| id.len() == 36), "{:?}", id());
    }
}
