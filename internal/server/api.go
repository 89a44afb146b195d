package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"strconv"
	"strings"

	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	"google.golang.org/protobuf/encoding/protojson"
	authenticationv1 "k8s.io/api/authentication/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	controlv1 "isthmus.dev/api/control/v1"
	"isthmus.dev/internal/discovery"
	"isthmus.dev/internal/model"
	"isthmus.dev/internal/xds"
)

var kindTypes = map[string]string{
	"clusters":  xds.ClusterType,
	"endpoints": xds.EndpointType,
	"listeners": xds.ListenerType,
	"routes":    xds.RouteType,
	"names":     xds.NameType,
	"workload":  xds.WorkloadConfigType,
}

// One source's tokens are looked at this often a second: whoever asks has shown
// nothing yet, and each look is a request to Kubernetes. People can't be told apart
// by their tokens, which are all of one account.
const (
	apiRate  = 10
	apiBurst = 100
)

// controlAPI answers the command line (api/control/v1).
type controlAPI struct {
	kube     kubernetes.Interface
	sources  *callers
	shed     *shedding
	mesh     *discovery.Mesh
	revision func() uint64
	log      *slog.Logger
}

func (a *controlAPI) register(mux *http.ServeMux) {
	mux.HandleFunc("GET "+controlv1.ProxiesPath, a.authorized(a.proxies))
	mux.HandleFunc("GET "+controlv1.ProxiesPath+"/{namespace}/{name}/config/{kind}", a.authorized(a.config))
	mux.HandleFunc("GET "+controlv1.ProxiesPath+"/{namespace}/{name}/why", a.authorized(a.why))
	mux.HandleFunc("GET "+controlv1.WhyPath, a.authorized(a.why))
	mux.HandleFunc("GET "+controlv1.ReachPath, a.authorized(a.reach))
}

type apiError struct {
	status int
	text   string
}

func (e *apiError) Error() string { return e.text }

func (a *controlAPI) authorized(f func(*http.Request) (any, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		answer, err := any(nil), a.authorize(r)
		if err == nil {
			answer, err = f(r)
		}
		w.Header().Set("Content-Type", "application/json")
		if err != nil {
			status := http.StatusInternalServerError
			text := "isthmusd could not answer: its log says why"
			if e := (*apiError)(nil); errors.As(err, &e) {
				status, text = e.status, e.text
			} else {
				a.log.Error("api request failed", "path", r.URL.Path, "error", err)
			}
			switch status {
			case http.StatusUnauthorized:
				w.Header().Set("WWW-Authenticate", "Bearer")
			case http.StatusTooManyRequests:
				w.Header().Set("Retry-After", strconv.Itoa(apiRetry))
			}
			w.WriteHeader(status)
			answer = controlv1.Error{Error: text}
		}
		_ = json.NewEncoder(w).Encode(answer)
	}
}

// authorize asks Kubernetes whose token it is, and what that user may.
func (a *controlAPI) authorize(r *http.Request) error {
	token, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	if !ok {
		return &apiError{http.StatusUnauthorized, "a bearer token of audience " + controlv1.Audience + " is needed"}
	}
	if !a.sources.allow(sourceOf(remote(r)).String()) {
		a.shed.api.Add(1)
		return &apiError{http.StatusTooManyRequests, "too many requests from this address: try again in a second"}
	}
	user, err := a.user(r.Context(), token)
	if err != nil {
		return err
	}
	extra := make(map[string]authorizationv1.ExtraValue, len(user.Extra))
	for k, v := range user.Extra {
		extra[k] = authorizationv1.ExtraValue(v)
	}
	review := &authorizationv1.SubjectAccessReview{Spec: authorizationv1.SubjectAccessReviewSpec{
		User: user.Username, UID: user.UID, Groups: user.Groups, Extra: extra,
		ResourceAttributes: &authorizationv1.ResourceAttributes{Verb: "get", Group: "isthmus.dev", Resource: "proxies",
			Namespace: r.PathValue("namespace"), Name: r.PathValue("name")},
	}}
	got, err := a.kube.AuthorizationV1().SubjectAccessReviews().Create(r.Context(), review, metav1.CreateOptions{})
	if err != nil {
		return fmt.Errorf("ask Kubernetes for permission: %w", err)
	}
	if !got.Status.Allowed {
		return &apiError{http.StatusForbidden, fmt.Sprintf("%s may not get proxies.isthmus.dev: bind it to a role that allows it", user.Username)}
	}
	return nil
}

func (a *controlAPI) user(ctx context.Context, token string) (*authenticationv1.UserInfo, error) {
	review := &authenticationv1.TokenReview{Spec: authenticationv1.TokenReviewSpec{Token: token, Audiences: []string{controlv1.Audience}}}
	got, err := a.kube.AuthenticationV1().TokenReviews().Create(ctx, review, metav1.CreateOptions{})
	if err != nil {
		return nil, fmt.Errorf("ask Kubernetes about the token: %w", err)
	}
	if !got.Status.Authenticated || !slices.Contains(got.Status.Audiences, controlv1.Audience) {
		return nil, &apiError{http.StatusUnauthorized, "the token is not valid here: it has expired, or is for another audience or cluster"}
	}
	return &got.Status.User, nil
}

func (a *controlAPI) proxies(*http.Request) (any, error) {
	list := controlv1.ProxyList{Revision: a.revision(), Proxies: []controlv1.Proxy{}}
	for _, p := range a.mesh.Proxies() {
		list.Proxies = append(list.Proxies, proxyOf(p))
	}
	return list, nil
}

func proxyOf(p discovery.ProxyStatus) controlv1.Proxy {
	out := controlv1.Proxy{
		Name: p.Workload.Instance, Namespace: p.Workload.Namespace, ServiceAccount: p.Workload.ServiceAccount,
		Identity: p.Identity, Address: p.Address, ConnectedAt: p.Since, Leaving: p.Gone,
		Version: p.Node.GetMetadata().GetFields()["ISTIO_VERSION"].GetStringValue(),
		Types:   map[string]controlv1.TypeStatus{},
	}
	for kind, typeURL := range kindTypes {
		revision, seen := p.Acknowledged[typeURL]
		st := controlv1.TypeStatus{Revision: revision, Synced: seen}
		if refusal, ok := p.Refusals[typeURL]; ok {
			st.Synced = false
			st.Refused = &controlv1.Refusal{Names: refusal.Names, Detail: refusal.Detail, At: refusal.At}
		}
		out.Types[kind] = st
	}
	// Whether it takes its virtual hosts one by one or not: they are its routes.
	if refusal, ok := p.Refusals[xds.VirtualHostType]; ok {
		routes := out.Types["routes"]
		routes.Synced = false
		routes.Refused = &controlv1.Refusal{Names: refusal.Names, Detail: refusal.Detail, At: refusal.At}
		out.Types["routes"] = routes
	}
	return out
}

func (a *controlAPI) config(r *http.Request) (any, error) {
	kind := r.PathValue("kind")
	typeURL, err := typeOfKind(kind)
	if err != nil {
		return nil, err
	}
	key, err := a.connected(r)
	if err != nil {
		return nil, err
	}
	out := controlv1.ProxyConfig{Kind: kind, Resources: []controlv1.Resource{}}
	var hosts []*xds.Resource
	if typeURL == xds.RouteType {
		hosts = a.mesh.Given(key, xds.VirtualHostType)
	}
	for _, res := range a.mesh.Given(key, typeURL) {
		m, err := res.Body.UnmarshalNew()
		if err != nil {
			return nil, fmt.Errorf("decode %s: %w", res.Name, err)
		}
		if table, ok := m.(*routev3.RouteConfiguration); ok {
			if err := addHosts(table, hosts); err != nil {
				return nil, err
			}
		}
		body, err := protojson.Marshal(m)
		if err != nil {
			return nil, fmt.Errorf("encode %s: %w", res.Name, err)
		}
		out.Resources = append(out.Resources, controlv1.Resource{Name: res.Name, Version: res.Version, Body: body})
	}
	slices.SortFunc(out.Resources, func(a, b controlv1.Resource) int { return strings.Compare(a.Name, b.Name) })
	return out, nil
}

// addHosts adds those virtual hosts that are a table's and come by themselves.
func addHosts(table *routev3.RouteConfiguration, hosts []*xds.Resource) error {
	for _, res := range hosts {
		if !strings.HasPrefix(res.Name, table.Name+"/") {
			continue
		}
		host := &routev3.VirtualHost{}
		if err := res.Body.UnmarshalTo(host); err != nil {
			return fmt.Errorf("decode %s: %w", res.Name, err)
		}
		table.VirtualHosts = append(table.VirtualHosts, host)
	}
	return nil
}

// connected finds the proxy that a request's path names.
func (a *controlAPI) connected(r *http.Request) (model.WorkloadKey, error) {
	namespace, name := r.PathValue("namespace"), r.PathValue("name")
	for _, p := range a.mesh.Proxies() {
		if p.Workload.Namespace == namespace && p.Workload.Instance == name {
			return p.Workload, nil
		}
	}
	return model.WorkloadKey{}, &apiError{http.StatusNotFound, fmt.Sprintf("no proxy %s is connected in namespace %s: see isthmus proxy status", name, namespace)}
}
