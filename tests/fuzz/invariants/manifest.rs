//! Invariant of manifests, configs and references, for any bytes whatever: parsing ends without a
//! panic, with an error or with a value that keeps its promises: no more layers than the limit,
//! one diff ID for each, platforms that print as they parse, references that print as they parse.

use harbour_image::{
    manifest::{ImageConfig, LAYERS_MAX, Manifest, Platform},
    reference::Reference,
};

/// The bytes up to the first NUL are a manifest, the rest a config; both are tried as a reference.
pub fn check(data: &[u8]) {
    let cut = data
        .iter()
        .position(|byte| *byte == 0)
        .unwrap_or(data.len());
    let (manifest, config) = data.split_at(cut);
    let config = ImageConfig::parse(config.get(1..).unwrap_or_default());
    for served in [None, Some("application/vnd.oci.image.index.v1+json")] {
        let Ok(parsed) = Manifest::parse(manifest, served) else {
            continue;
        };
        match &parsed {
            Manifest::Image(image) => {
                let Ok(config) = &config else { continue };
                if let Ok(layers) = image.layers(config) {
                    assert_eq!(layers.len(), config.diff_ids.len());
                    assert!(layers.len() <= LAYERS_MAX);
                }
            }
            Manifest::Index(index) => {
                let _ = index.select(&Platform::host());
            }
        }
    }
    if let Ok(text) = std::str::from_utf8(manifest) {
        if let Ok(reference) = text.parse::<Reference>() {
            let printed = reference.to_string();
            assert_eq!(
                printed.parse::<Reference>().ok(),
                Some(reference),
                "{printed:?}"
            );
        }
        if let Ok(platform) = text.parse::<Platform>() {
            let printed = platform.to_string();
            assert_eq!(
                printed.parse::<Platform>().ok(),
                Some(platform),
                "{printed:?}"
            );
        }
    }
}
