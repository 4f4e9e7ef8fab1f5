//! What a registry is told about who asks: nothing, user and password, or a token.
//!
//! Source: the distribution project's "Token Authentication Specification" (GET with a scope) and
//! "OAuth2" (POST with a refresh token) pages.

use std::time::{Duration, Instant};

use base64::{Engine, engine::general_purpose::STANDARD};
use reqwest::{Client, header::HeaderValue};
use serde::Deserialize;
use tokio::sync::Mutex;
use url::Url;

use super::{
    challenge::{self, Challenge},
    credentials,
    http::{read_body, status_error},
};
use crate::source::{
    error::{SourceError, public_url},
    options::{AuthOptions, Credential, Deadlines},
};

/// Largest answer of a token server, and longest token, in bytes.
const ANSWER_MAX: u64 = 1 << 20;
const TOKEN_MAX: usize = 64 << 10;

/// A token with no lifetime lives this long, says the specification.
const DEFAULT_LIFETIME: Duration = Duration::from_secs(60);

/// Authorisation at one endpoint for one repository.
pub(crate) struct Authority {
    /// Host and port, or `docker.io`: the key of credentials.
    key: String,
    repository: String,
    options: AuthOptions,
    deadlines: Deadlines,
    /// Whether tokens may be fetched and credentials sent over plain HTTP.
    insecure: bool,
    // Held while a token is fetched, so that layers read at the same time share one.
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    header: Option<HeaderValue>,
    expires: Option<Instant>,
    credential: Option<Option<Credential>>,
    trouble: Option<String>,
}

impl State {
    fn fresh(&self) -> Option<HeaderValue> {
        let fresh = self.expires.is_none_or(|expires| Instant::now() < expires);
        self.header.clone().filter(|_| fresh)
    }
}

impl Authority {
    pub(crate) fn new(
        key: &str,
        repository: &str,
        options: AuthOptions,
        deadlines: Deadlines,
        insecure: bool,
    ) -> Self {
        let (key, repository) = (key.to_owned(), repository.to_owned());
        Self {
            key,
            repository,
            options,
            deadlines,
            insecure,
            state: Mutex::default(),
        }
    }

    /// The header to send with a first try; none before the registry asked for one.
    pub(crate) async fn current(&self) -> Option<HeaderValue> {
        self.state.lock().await.fresh()
    }

    /// The header that answers a 401 with these `WWW-Authenticate` lines; `refused` is the one
    /// that was sent. `None` when there is nothing better to send.
    pub(crate) async fn answer(
        &self,
        client: &Client,
        origin: &Url,
        challenges: &[String],
        refused: Option<&HeaderValue>,
    ) -> Result<Option<HeaderValue>, SourceError> {
        let mut state = self.state.lock().await;
        if let Some(newer) = state.fresh().filter(|header| Some(header) != refused) {
            return Ok(Some(newer));
        }
        let found = if let Some(found) = state.credential.clone() {
            found
        } else {
            let (found, trouble) = self.look_up().await;
            state.credential = Some(found.clone());
            state.trouble = trouble;
            found
        };
        let mut parsed: Vec<Challenge> = challenges
            .iter()
            .flat_map(|line| challenge::parse(line))
            .collect();
        // Tokens first: they are worth less to a thief than a password.
        parsed.sort_by_key(|challenge| matches!(challenge, Challenge::Basic));
        for challenge in parsed {
            let (header, expires) = match (challenge, &found) {
                (
                    Challenge::Bearer {
                        realm,
                        service,
                        scope,
                    },
                    credential,
                ) => {
                    let realm = self.check_realm(&realm, origin)?;
                    let scope =
                        scope.unwrap_or_else(|| format!("repository:{}:pull", self.repository));
                    let wish = Wish {
                        realm,
                        service,
                        scope,
                    };
                    let token = self.fetch(client, &wish, credential.as_ref()).await?;
                    (token.header, Some(token.expires))
                }
                (Challenge::Basic, Some(credential @ Credential::Password { .. })) => {
                    (basic(credential), None)
                }
                (Challenge::Basic, _) => continue,
            };
            if header.is_none() || header.as_ref() == refused {
                continue;
            }
            state.header.clone_from(&header);
            state.expires = expires;
            return Ok(header);
        }
        state.header = None;
        Ok(None)
    }

    /// The error for an answer that no credential of ours could change.
    pub(crate) async fn denied(&self, url: &Url, status: u16) -> SourceError {
        let state = self.state.lock().await;
        let mut hint = match &state.credential {
            Some(Some(_)) => {
                "the credentials that are stored for it were not enough; log in again".to_owned()
            }
            _ => format!(
                "the image is private or does not exist; log in with docker login {}",
                self.key
            ),
        };
        if let Some(trouble) = &state.trouble {
            hint.push_str(&format!(" ({trouble})"));
        }
        SourceError::Denied {
            url: public_url(url),
            repository: self.repository.clone(),
            status,
            hint,
        }
    }

    async fn look_up(&self) -> (Option<Credential>, Option<String>) {
        if let Some(credential) = &self.options.credential {
            return (Some(credential.clone()), None);
        }
        credentials::find(
            &self.options,
            &self.key,
            &self.repository,
            self.deadlines.helper,
        )
        .await
    }

    /// Refuses to send secrets over plain HTTP because a registry said so.
    fn check_realm(&self, realm: &str, origin: &Url) -> Result<Url, SourceError> {
        let bad = |reason: &str| SourceError::Protocol {
            url: public_url(origin),
            reason: format!("its token server's address {reason}"),
        };
        let url = Url::parse(realm).map_err(|_| bad("is no address"))?;
        if !matches!(url.scheme(), "http" | "https") || url.host_str().is_none() {
            return Err(bad("is not one of HTTP"));
        }
        if url.scheme() == "http" && !(self.insecure && origin.scheme() == "http") {
            return Err(bad(
                "is plain HTTP, which is allowed only for insecure registries",
            ));
        }
        if !url.username().is_empty() || url.password().is_some() {
            return Err(bad("has a user in it"));
        }
        Ok(url)
    }

    async fn fetch(
        &self,
        client: &Client,
        wish: &Wish,
        credential: Option<&Credential>,
    ) -> Result<Token, SourceError> {
        let request = match credential {
            Some(Credential::IdentityToken(token)) => wish.post(client, token),
            Some(password @ Credential::Password { .. }) => wish.get(client, basic(password)),
            None => wish.get(client, None),
        };
        let url = &wish.realm;
        let late = |_| SourceError::Timeout {
            url: public_url(url),
            what: "token",
            after: self.deadlines.request,
        };
        let answer = async {
            let response = request
                .send()
                .await
                .map_err(|e| SourceError::transport(url, e))?;
            match response.status().as_u16() {
                200..=299 => read_body(response, url, ANSWER_MAX, self.deadlines.read).await,
                status @ (400 | 401 | 403) => Err(SourceError::Denied {
                    url: public_url(url),
                    repository: self.repository.clone(),
                    status,
                    hint: format!(
                        "it gave no token; log in again with docker login {}",
                        self.key
                    ),
                }),
                _ => Err(status_error(response, url, self.deadlines.read).await),
            }
        };
        let body = tokio::time::timeout(self.deadlines.request, answer)
            .await
            .map_err(late)??;
        Token::parse(&body).ok_or_else(|| SourceError::Protocol {
            url: public_url(url),
            reason: "its answer holds no token".to_owned(),
        })
    }
}

/// What is asked of a token server.
struct Wish {
    realm: Url,
    service: Option<String>,
    scope: String,
}

impl Wish {
    fn get(&self, client: &Client, authorization: Option<HeaderValue>) -> reqwest::RequestBuilder {
        let mut url = self.realm.clone();
        {
            let mut query = url.query_pairs_mut();
            if let Some(service) = &self.service {
                query.append_pair("service", service);
            }
            // Several scopes come in one text and go as one parameter each.
            for scope in self
                .scope
                .split(' ')
                .filter(|scope| !scope.is_empty())
                .take(16)
            {
                query.append_pair("scope", scope);
            }
        }
        let request = client.get(url);
        match authorization {
            Some(header) => request.header(reqwest::header::AUTHORIZATION, header),
            None => request,
        }
    }

    fn post(&self, client: &Client, refresh_token: &str) -> reqwest::RequestBuilder {
        let mut form = url::form_urlencoded::Serializer::new(String::new());
        form.append_pair("grant_type", "refresh_token")
            .append_pair("client_id", "imageharbour")
            .append_pair("scope", &self.scope)
            .append_pair("refresh_token", refresh_token);
        if let Some(service) = &self.service {
            form.append_pair("service", service);
        }
        client
            .post(self.realm.clone())
            .header(
                reqwest::header::CONTENT_TYPE,
                "application/x-www-form-urlencoded",
            )
            .body(form.finish())
    }
}

struct Token {
    header: Option<HeaderValue>,
    expires: Instant,
}

impl Token {
    fn parse(body: &[u8]) -> Option<Self> {
        #[derive(Deserialize)]
        struct Answer {
            token: Option<String>,
            access_token: Option<String>,
            expires_in: Option<u64>,
        }
        let answer: Answer = serde_json::from_slice(body).ok()?;
        let filled = |token: &String| (1..=TOKEN_MAX).contains(&token.len());
        let token = answer
            .token
            .filter(filled)
            .or(answer.access_token.filter(filled))?;
        let lifetime = answer
            .expires_in
            .map_or(DEFAULT_LIFETIME, Duration::from_secs);
        // A day is longer than any pull, and keeps the sum in range whatever the server says.
        let lifetime = lifetime.min(Duration::from_secs(86_400));
        // Renewed a little early, so that it does not run out on its way.
        let expires =
            Instant::now() + lifetime.saturating_sub(lifetime.min(Duration::from_secs(50)) / 5);
        Some(Self {
            header: Some(sensitive(&format!("Bearer {token}"))?),
            expires,
        })
    }
}

fn basic(credential: &Credential) -> Option<HeaderValue> {
    match credential {
        Credential::Password { user, password } => sensitive(&format!(
            "Basic {}",
            STANDARD.encode(format!("{user}:{password}"))
        )),
        Credential::IdentityToken(_) => None,
    }
}

/// A header value that is left out of debug output and of compression tables.
fn sensitive(text: &str) -> Option<HeaderValue> {
    let mut value = HeaderValue::from_str(text).ok()?;
    value.set_sensitive(true);
    Some(value)
}
