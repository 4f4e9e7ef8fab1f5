//! Connections with bounds: so many at a time, and none that says nothing.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream, UnixListener, UnixStream},
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    time::Sleep,
};
use tokio_stream::{Stream, wrappers::ReceiverStream};
use tonic::transport::server::Connected;

/// Bytes with which every HTTP/2 client begins.
const PREFACE_BYTES: usize = 24;
/// Time for them.
const PREFACE_TIME: Duration = Duration::from_secs(5);
/// Pause after a failed accept: file descriptors may have run out.
pub(super) const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Something that accepts connections.
pub(super) trait Listen: Send + 'static {
    /// A connection.
    type Io: AsyncRead + AsyncWrite + Unpin + Send + 'static;

    /// The next connection.
    fn next(&mut self) -> impl Future<Output = io::Result<Self::Io>> + Send;
}

impl Listen for UnixListener {
    type Io = UnixStream;

    async fn next(&mut self) -> io::Result<UnixStream> {
        self.accept().await.map(|(stream, _)| stream)
    }
}

impl Listen for TcpListener {
    type Io = TcpStream;

    async fn next(&mut self) -> io::Result<TcpStream> {
        let (stream, _) = self.accept().await?;
        stream.set_nodelay(true)?;
        Ok(stream)
    }
}

/// A connection that counts, and that ends when it has not begun in time.
#[derive(Debug)]
pub(super) struct Guarded<T> {
    inner: T,
    /// Until this many more bytes have come, the deadline holds.
    wanted: usize,
    deadline: Option<Pin<Box<Sleep>>>,
    _place: OwnedSemaphorePermit,
}

impl<T> Guarded<T> {
    /// `wanted` bytes have to come within `time`.
    pub(super) fn new(
        inner: T,
        place: OwnedSemaphorePermit,
        wanted: usize,
        time: Duration,
    ) -> Self {
        Self {
            inner,
            wanted,
            deadline: Some(Box::pin(tokio::time::sleep(time))),
            _place: place,
        }
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Guarded<T> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if let Some(deadline) = &mut this.deadline
            && deadline.as_mut().poll(cx).is_ready()
        {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        let before = buf.filled().len();
        ready!(Pin::new(&mut this.inner).poll_read(cx, buf))?;
        this.wanted = this.wanted.saturating_sub(buf.filled().len() - before);
        if this.wanted == 0 {
            this.deadline = None;
        }
        Poll::Ready(Ok(()))
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Guarded<T> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().inner).poll_write(cx, buf)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().inner).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().inner).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().inner).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }
}

impl<T> Connected for Guarded<T> {
    type ConnectInfo = ();

    fn connect_info(&self) {}
}

/// Connections for gRPC.
#[derive(Debug)]
pub(super) struct Incoming<T> {
    accepted: ReceiverStream<io::Result<Guarded<T>>>,
}

impl<T> Incoming<T> {
    /// Those that come out of `accepted`.
    pub(super) fn new(accepted: mpsc::Receiver<io::Result<Guarded<T>>>) -> Self {
        Self {
            accepted: ReceiverStream::new(accepted),
        }
    }
}

impl<T> Stream for Incoming<T> {
    type Item = io::Result<Guarded<T>>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        Pin::new(&mut self.get_mut().accepted).poll_next(cx)
    }
}

/// Accepts while there are places. Ends when the stream is dropped.
pub(super) fn incoming<L: Listen>(mut listener: L, places: Arc<Semaphore>) -> Incoming<L::Io> {
    let (send, receive) = mpsc::channel(1);
    tokio::spawn(async move {
        loop {
            let Ok(place) = places.clone().acquire_owned().await else {
                return;
            };
            let stream = tokio::select! {
                stream = listener.next() => stream,
                () = send.closed() => return,
            };
            match stream {
                Ok(stream) => {
                    if send.send(Ok(greeted(stream, place))).await.is_err() {
                        return;
                    }
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    });
    Incoming::new(receive)
}

/// A connection that has to begin as HTTP/2 does.
pub(super) fn greeted<T>(stream: T, place: OwnedSemaphorePermit) -> Guarded<T> {
    Guarded::new(stream, place, PREFACE_BYTES, PREFACE_TIME)
}
