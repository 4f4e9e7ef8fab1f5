//! What Docker calls an image.

use harbour_image::{
    digest::Digest,
    reference::{ImageName, LOCAL_REGISTRY},
};

/// The names of an image in Docker, as its repositories have them: short where the registry is Docker's
/// own.
///
/// An image that came from a registry has one by its digest too, as one that Docker pulled.
pub fn names(image: &ImageName, manifest: &Digest) -> Vec<String> {
    let repository = repository(image);
    let by_digest = format!("{repository}@{manifest}");
    if image.tag.starts_with("sha256:") {
        return vec![format!("{repository}@{}", image.tag)];
    }
    let by_tag = format!("{repository}:{}", image.tag);
    match image.registry.as_str() {
        LOCAL_REGISTRY => vec![by_tag],
        _ => vec![by_tag, by_digest],
    }
}

/// The repository of a name that Docker has.
pub fn repository_of(name: &str) -> &str {
    if let Some((repository, _)) = name.split_once('@') {
        return repository;
    }
    let component = name.rfind('/').map_or(0, |at| at + 1);
    match name[component..].find(':') {
        Some(at) => &name[..component + at],
        None => name,
    }
}

/// Whether a pattern, in which `*` stands for anything, is that of an image by any of its names: the
/// catalogue's or Docker's.
pub fn matches(pattern: &str, image: &ImageName) -> bool {
    let full = format!("{}/{}:{}", image.registry, image.repository, image.tag);
    let short = format!("{}:{}", repository(image), image.tag);
    like(pattern, &full) || like(pattern, &short)
}

fn repository(image: &ImageName) -> String {
    match (
        image.registry.as_str(),
        image.repository.strip_prefix("library/"),
    ) {
        ("docker.io", Some(official)) => official.to_owned(),
        ("docker.io", None) => image.repository.clone(),
        (registry, _) => format!("{registry}/{}", image.repository),
    }
}

fn like(pattern: &str, text: &str) -> bool {
    let mut parts = pattern.split('*');
    let first = parts.next().unwrap_or_default();
    let Some(mut rest) = text.strip_prefix(first) else {
        return false;
    };
    let mut last = None;
    for part in parts {
        if let Some(middle) = last.replace(part) {
            match rest.find(middle) {
                Some(at) => rest = &rest[at + middle.len()..],
                None => return false,
            }
        }
    }
    match last {
        Some(end) => rest.ends_with(end),
        None => rest.is_empty(),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn image(registry: &str, repository: &str, tag: &str) -> ImageName {
        ImageName {
            registry: registry.into(),
            repository: repository.into(),
            tag: tag.into(),
        }
    }

    #[test]
    fn names_are_as_docker_writes_them() {
        let manifest = Digest::of(b"m");
        let of = |registry, repository, tag| names(&image(registry, repository, tag), &manifest);
        let debian = of("docker.io", "library/debian", "12");
        assert_eq!(debian, ["debian:12", &format!("debian@{manifest}")]);
        assert_eq!(of("docker.io", "org/app", "1")[0], "org/app:1");
        assert_eq!(of("r.example:5000", "a/b", "1")[0], "r.example:5000/a/b:1");
        assert_eq!(of("localhost", "layout", "i"), ["localhost/layout:i"]);
        let digest = manifest.to_string();
        assert_eq!(of("quay.io", "a", &digest), [format!("quay.io/a@{digest}")]);
        for name in ["debian:12", "debian@sha256:00", "debian"] {
            assert_eq!(repository_of(name), "debian");
        }
        assert_eq!(repository_of("r.example:5000/a/b:1"), "r.example:5000/a/b");
        assert_eq!(repository_of("r.example:5000/a/b"), "r.example:5000/a/b");
    }

    #[test]
    fn patterns_match_by_either_name() {
        let debian = image("docker.io", "library/debian", "12");
        for yes in [
            "*",
            "debian:12",
            "debian:*",
            "docker.io/*",
            "*:12",
            "d*n:1*",
            "*b*2",
        ] {
            assert!(matches(yes, &debian), "{yes}");
        }
        for no in ["debian", "quay.io/*", "*:13", "d*n", "", "*x*"] {
            assert!(!matches(no, &debian), "{no}");
        }
    }
}
