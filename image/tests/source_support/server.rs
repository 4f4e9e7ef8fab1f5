//! A small HTTP/1.1 server that does as told, one connection per request.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

/// What a client sent.
#[derive(Clone, Debug, Default)]
pub(crate) struct Request {
    pub(crate) method: String,
    pub(crate) path: String,
    pub(crate) query: String,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: String,
}

impl Request {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        let found = self
            .headers
            .iter()
            .find(|(key, _)| key.eq_ignore_ascii_case(name));
        found.map(|(_, value)| value.as_str())
    }

    /// First byte of a `Range: bytes=N-`.
    pub(crate) fn range_start(&self) -> Option<usize> {
        self.header("range")?
            .strip_prefix("bytes=")?
            .strip_suffix('-')?
            .parse()
            .ok()
    }
}

/// What is sent back.
#[derive(Clone, Debug)]
pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
    /// Bytes of the body after which the connection is cut.
    pub(crate) cut: Option<usize>,
    /// Wait after `cut` bytes (or before the first) instead of cutting.
    pub(crate) stall: Option<Duration>,
    /// Sends the body again and again with no length.
    pub(crate) endless: bool,
    /// Sent in place of everything else.
    pub(crate) raw: Option<Vec<u8>>,
}

impl Reply {
    pub(crate) fn new(status: u16, body: impl Into<Vec<u8>>) -> Self {
        let body = body.into();
        Self {
            status,
            headers: Vec::new(),
            body,
            cut: None,
            stall: None,
            endless: false,
            raw: None,
        }
    }

    pub(crate) fn with(mut self, name: &str, value: impl Into<String>) -> Self {
        self.headers.push((name.to_owned(), value.into()));
        self
    }

    pub(crate) fn cut_at(mut self, bytes: usize) -> Self {
        self.cut = Some(bytes);
        self
    }

    pub(crate) fn stalled(mut self, at: usize, wait: Duration) -> Self {
        (self.cut, self.stall) = (Some(at), Some(wait));
        self
    }

    pub(crate) fn endless(mut self) -> Self {
        self.endless = true;
        self
    }

    pub(crate) fn raw(bytes: impl Into<Vec<u8>>) -> Self {
        let mut reply = Self::new(200, "");
        reply.raw = Some(bytes.into());
        reply
    }
}

type Handler = dyn Fn(&Request, usize) -> Reply + Send + Sync;

/// A running server; stops when dropped.
pub(crate) struct Server {
    address: SocketAddr,
    seen: Arc<Mutex<Vec<Request>>>,
    stop: Arc<AtomicBool>,
    /// Connections that the client closed before everything was sent.
    pub(crate) broken: Arc<AtomicUsize>,
}

impl Server {
    /// Answers every request with `handler`, which also gets the number of requests of the same
    /// path that came before.
    pub(crate) fn start(
        handler: impl Fn(&Request, usize) -> Reply + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let server = Self {
            address: listener.local_addr().unwrap(),
            seen: Arc::default(),
            stop: Arc::default(),
            broken: Arc::default(),
        };
        let handler: Arc<Handler> = Arc::new(handler);
        let (seen, stop, broken) = (
            Arc::clone(&server.seen),
            Arc::clone(&server.stop),
            Arc::clone(&server.broken),
        );
        thread::spawn(move || {
            for stream in listener.incoming() {
                if stop.load(Ordering::SeqCst) {
                    return;
                }
                let Ok(stream) = stream else { return };
                let (handler, seen, broken) =
                    (Arc::clone(&handler), Arc::clone(&seen), Arc::clone(&broken));
                thread::spawn(move || {
                    if serve(&stream, &*handler, &seen).is_err() {
                        broken.fetch_add(1, Ordering::SeqCst);
                    }
                    let _ = stream.shutdown(Shutdown::Both);
                });
            }
        });
        server
    }

    /// `127.0.0.1:port`.
    pub(crate) fn host(&self) -> String {
        self.address.to_string()
    }

    pub(crate) fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    /// The requests so far.
    pub(crate) fn seen(&self) -> Vec<Request> {
        self.seen.lock().unwrap().clone()
    }

    /// The requests so far whose path ends with `end`.
    pub(crate) fn seen_at(&self, end: &str) -> Vec<Request> {
        self.seen()
            .into_iter()
            .filter(|request| request.path.ends_with(end))
            .collect()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(self.address);
    }
}

fn serve(stream: &TcpStream, handler: &Handler, seen: &Mutex<Vec<Request>>) -> std::io::Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    stream.set_write_timeout(Some(Duration::from_secs(20)))?;
    // A TLS hello, and anything else that is not HTTP, gets what Go's servers say.
    let Some(request) = read_request(stream) else {
        return (&*stream)
            .write_all(b"HTTP/1.0 400 Bad Request\r\n\r\nClient sent an HTTP request");
    };
    let before = {
        let mut seen = seen.lock().unwrap();
        let before = seen
            .iter()
            .filter(|other| other.path == request.path)
            .count();
        seen.push(request.clone());
        before
    };
    send(stream, &handler(&request, before))
}

fn read_request(stream: &TcpStream) -> Option<Request> {
    let mut reader = BufReader::new(stream);
    let first = reader.fill_buf().ok()?.first().copied()?;
    if !first.is_ascii_uppercase() {
        return None;
    }
    let mut line = String::new();
    reader.read_line(&mut line).ok()?;
    let mut words = line.split_whitespace();
    let (method, target) = (words.next()?.to_owned(), words.next()?.to_owned());
    let (path, query) = target.split_once('?').unwrap_or((&target, ""));
    let (path, query) = (path.to_owned(), query.to_owned());
    let mut request = Request {
        method,
        path,
        query,
        ..Request::default()
    };
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        let Some((name, value)) = line.trim_end().split_once(':') else {
            break;
        };
        request
            .headers
            .push((name.to_owned(), value.trim().to_owned()));
    }
    let length = request
        .header("content-length")
        .and_then(|text| text.parse().ok())
        .unwrap_or(0);
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    request.body = String::from_utf8(body).ok()?;
    Some(request)
}

fn send(mut stream: &TcpStream, reply: &Reply) -> std::io::Result<()> {
    if let Some(raw) = &reply.raw {
        return stream.write_all(raw);
    }
    let mut head = format!("HTTP/1.1 {} X\r\nConnection: close\r\n", reply.status);
    let has_length = reply
        .headers
        .iter()
        .any(|(name, _)| name == "Content-Length");
    if !reply.endless && !has_length {
        head.push_str(&format!("Content-Length: {}\r\n", reply.body.len()));
    }
    for (name, value) in &reply.headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    head.push_str("\r\n");
    stream.write_all(head.as_bytes())?;
    let cut = reply.cut.unwrap_or(reply.body.len()).min(reply.body.len());
    stream.write_all(&reply.body[..cut])?;
    if let Some(wait) = reply.stall {
        thread::sleep(wait);
        stream.write_all(&reply.body[cut..])?;
    }
    if reply.endless {
        loop {
            stream.write_all(&reply.body)?;
        }
    }
    stream.flush()
}
