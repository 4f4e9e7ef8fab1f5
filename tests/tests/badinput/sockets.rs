//! Garbage for everything that listens below the run directory.

use std::{
    io::{Read, Write},
    os::unix::{
        fs::FileTypeExt,
        net::{UnixDatagram, UnixStream},
    },
    path::PathBuf,
    time::Duration,
};

use anyhow::Result;
use harbour_tests::cluster::Cluster;

use crate::images::noise;

/// Connections left hanging at each socket.
const HANGING: usize = 200;

/// Attacks every socket that is found, and gives their paths.
pub fn attack(cluster: &Cluster) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(cluster.run_dir())? {
        let entry = entry?;
        if entry.file_type()?.is_socket() {
            found.push(entry.path());
        }
    }
    let http2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    let messages: Vec<Vec<u8>> = vec![
        noise(1 << 20),
        vec![0; 1 << 20],
        vec![0xff; 1 << 16],
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec(),
        // A frame that claims 16 MiB, one of a stream that was never opened, one of no known type.
        [&http2[..], &[0xff, 0xff, 0xff, 0, 0, 0, 0, 0, 1]].concat(),
        [&http2[..], &[0, 0, 8, 3, 0, 0, 0, 0, 9], &[1; 8]].concat(),
        [&http2[..], &[0, 0, 4, 99, 0, 0, 0, 0, 0], &[1; 4]].concat(),
        // Settings without end.
        [&http2[..], &[0, 0, 0, 4, 0, 0, 0, 0, 0].repeat(50_000)].concat(),
        u32::MAX.to_le_bytes().to_vec(),
        u32::MAX.to_be_bytes().repeat(1000),
        b"{\"json\": [".repeat(10_000),
        Vec::new(),
    ];
    for path in &found {
        for message in &messages {
            // Refusing, closing early and ignoring are all right; hanging or dying is not.
            let Ok(mut stream) = UnixStream::connect(path) else {
                continue;
            };
            stream.set_write_timeout(Some(Duration::from_secs(2)))?;
            stream.set_read_timeout(Some(Duration::from_millis(200)))?;
            let _ = stream.write_all(message);
            let _ = stream.read(&mut [0_u8; 4096]);
        }
        let datagram = UnixDatagram::unbound()?;
        let _ = datagram.send_to(&noise(1000), path);
        let hanging: Vec<_> = (0..HANGING).map_while(|_| connect_briefly(path)).collect();
        drop(hanging);
    }
    Ok(found)
}

/// A connection that says nothing. A full backlog blocks `connect`, so it is tried in a thread.
fn connect_briefly(path: &std::path::Path) -> Option<UnixStream> {
    let (send, receive) = std::sync::mpsc::channel();
    let path = path.to_owned();
    std::thread::spawn(move || {
        let _ = send.send(UnixStream::connect(path));
    });
    receive.recv_timeout(Duration::from_secs(1)).ok()?.ok()
}
