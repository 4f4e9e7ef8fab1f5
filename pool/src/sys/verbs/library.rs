//! Opening libibverbs.

use std::{
    ffi::{CStr, c_void},
    ptr::NonNull,
    sync::OnceLock,
};

use nix::libc;

use super::abi;

/// Its name for the dynamic linker. The number is that of the binary interface.
const LIBRARY: &CStr = c"libibverbs.so.1";
/// Why the library cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum LibraryError {
    /// The dynamic linker does not find it or its parts.
    #[error("{0}")]
    Missing(String),
    /// It lacks a function.
    #[error("libibverbs has no {0}")]
    Symbol(&'static str),
}

/// libibverbs, opened once for the process and never closed.
pub(crate) fn library() -> Result<&'static abi::Functions, LibraryError> {
    static LIBRARY: OnceLock<Result<abi::Functions, LibraryError>> = OnceLock::new();
    LIBRARY
        .get_or_init(open_library)
        .as_ref()
        .map_err(Clone::clone)
}

// The types are those of the fields that the functions are put into.
#[allow(clippy::missing_transmute_annotations)]
fn open_library() -> Result<abi::Functions, LibraryError> {
    // SAFETY: a NUL-terminated name; the library's initialisers are those that every program linked
    // against it runs.
    let handle = unsafe { libc::dlopen(LIBRARY.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
    let Some(handle) = NonNull::new(handle) else {
        // SAFETY: takes no argument; the text belongs to this thread until its next dl call.
        let text = unsafe { libc::dlerror() };
        if text.is_null() {
            return Err(LibraryError::Missing(
                "libibverbs.so.1 cannot be opened".to_owned(),
            ));
        }
        // SAFETY: not null, NUL-terminated, and copied before the next dl call of this thread.
        let text = unsafe { CStr::from_ptr(text) };
        return Err(LibraryError::Missing(text.to_string_lossy().into_owned()));
    };
    macro_rules! symbol {
        ($name:literal) => {{
            const NAME: &str = concat!("ibv_", $name, "\0");
            // SAFETY: `handle` is of a library that is never closed, the name is NUL-terminated.
            let found = unsafe { libc::dlsym(handle.as_ptr(), NAME.as_ptr().cast()) };
            if found.is_null() {
                return Err(LibraryError::Symbol(concat!("ibv_", $name)));
            }
            // SAFETY: the symbol is the function of that name in its default version, whose type is
            // the field's by `infiniband/verbs.h`.
            unsafe { std::mem::transmute::<*mut c_void, _>(found) }
        }};
    }
    Ok(abi::Functions {
        get_device_list: symbol!("get_device_list"),
        free_device_list: symbol!("free_device_list"),
        get_device_name: symbol!("get_device_name"),
        open_device: symbol!("open_device"),
        close_device: symbol!("close_device"),
        query_device: symbol!("query_device"),
        query_port: symbol!("query_port"),
        alloc_pd: symbol!("alloc_pd"),
        dealloc_pd: symbol!("dealloc_pd"),
        reg_mr: symbol!("reg_mr"),
        dereg_mr: symbol!("dereg_mr"),
        create_comp_channel: symbol!("create_comp_channel"),
        destroy_comp_channel: symbol!("destroy_comp_channel"),
        create_cq: symbol!("create_cq"),
        destroy_cq: symbol!("destroy_cq"),
        get_cq_event: symbol!("get_cq_event"),
        ack_cq_events: symbol!("ack_cq_events"),
        create_qp: symbol!("create_qp"),
        modify_qp: symbol!("modify_qp"),
        destroy_qp: symbol!("destroy_qp"),
    })
}
