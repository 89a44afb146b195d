package cli

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	controlv1 "isthmus.dev/api/control/v1"
)

// standaloneKubeconfig is where isthmusd --standalone puts its kubeconfig by
// default; the command finds it by itself on the same host.
const standaloneKubeconfig = "/var/lib/isthmusd/kubeconfig"

// rootNamespace of the mesh, Istio's.
const rootNamespace = "istio-system"

// options are the flags of every command.
type options struct {
	kubeconfig, context, namespace, output, server string
	out, errOut                                    io.Writer
}

// config reads the kubeconfig and fills in the namespace.
func (o *options) config() (*rest.Config, error) {
	rules := clientcmd.NewDefaultClientConfigLoadingRules()
	rules.ExplicitPath = o.kubeconfig
	if o.kubeconfig == "" && os.Getenv(clientcmd.RecommendedConfigPathEnvVar) == "" {
		if _, err := os.Stat(rules.GetDefaultFilename()); err != nil {
			if f, err := os.Open(standaloneKubeconfig); err == nil {
				f.Close()
				rules.ExplicitPath = standaloneKubeconfig
			}
		}
	}
	loader := clientcmd.NewNonInteractiveDeferredLoadingClientConfig(rules, &clientcmd.ConfigOverrides{CurrentContext: o.context})
	cfg, err := loader.ClientConfig()
	if clientcmd.IsEmptyConfig(err) {
		looked := ""
		if path := os.Getenv(clientcmd.RecommendedConfigPathEnvVar); path != "" {
			looked = fmt.Sprintf(" in %s, as KUBECONFIG says", path)
		}
		return nil, fmt.Errorf("no kubeconfig found%s: give --kubeconfig, or set KUBECONFIG as isthmusd prints it", looked)
	}
	if err != nil {
		return nil, fmt.Errorf("read kubeconfig: %w: give another by --kubeconfig, or --context", err)
	}
	if o.namespace == "" {
		if o.namespace, _, err = loader.Namespace(); err != nil {
			return nil, fmt.Errorf("read kubeconfig: %w", err)
		}
	}
	cfg.Wrap(func(next http.RoundTripper) http.RoundTripper { return &reach{next, cfg.Host} })
	return cfg, nil
}

// reach says whom a request that got no answer was for.
type reach struct {
	next http.RoundTripper
	host string
}

func (r *reach) RoundTrip(req *http.Request) (*http.Response, error) {
	resp, err := r.next.RoundTrip(req)
	if err != nil && req.Context().Err() == nil {
		return nil, fmt.Errorf("%w (no answer of the Kubernetes API %s that the kubeconfig names: does it, or isthmusd --standalone, run there?)", err, r.host)
	}
	return resp, err
}

// server says where isthmusd is, and which roots it is trusted by.
type server struct {
	address string
	bundle  []byte
}

func (o *options) find(ctx context.Context, kube kubernetes.Interface) (*server, error) {
	cm, err := kube.CoreV1().ConfigMaps(rootNamespace).Get(ctx, controlv1.ServerConfigMap, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil, fmt.Errorf("isthmusd has not run on this cluster yet: it writes ConfigMap %s/%s at its start (another cluster by --context?)", rootNamespace, controlv1.ServerConfigMap)
	}
	if err != nil {
		return nil, fmt.Errorf("find isthmusd by ConfigMap %s/%s: %w", rootNamespace, controlv1.ServerConfigMap, refused(err))
	}
	s := &server{address: cm.Data[controlv1.AddressKey], bundle: []byte(cm.Data[controlv1.BundleKey])}
	if o.server != "" {
		s.address = o.server
	}
	return s, nil
}

// refused adds the remedy where the user may not do what a command needs.
func refused(err error) error {
	switch {
	case apierrors.IsForbidden(err):
		return fmt.Errorf("no permission; ask for it: %w", err)
	case apierrors.IsUnauthorized(err):
		return fmt.Errorf("the API server does not accept the kubeconfig's credentials; they may have expired, or be another cluster's: %w", err)
	}
	return err
}

// control asks isthmusd.
type control struct {
	server *server
	token  string
	client *http.Client
}

func (o *options) control(ctx context.Context) (*control, error) {
	cfg, err := o.config()
	if err != nil {
		return nil, err
	}
	kube, err := kubernetes.NewForConfig(cfg)
	if err != nil {
		return nil, err
	}
	s, err := o.find(ctx, kube)
	if err != nil {
		return nil, err
	}
	seconds := int64(600)
	token, err := kube.CoreV1().ServiceAccounts(rootNamespace).CreateToken(ctx, controlv1.Reader, &authenticationv1.TokenRequest{
		Spec: authenticationv1.TokenRequestSpec{Audiences: []string{controlv1.Audience}, ExpirationSeconds: &seconds},
	}, metav1.CreateOptions{})
	if err != nil {
		return nil, fmt.Errorf("get a token of ServiceAccount %s/%s to ask isthmusd with: %w", rootNamespace, controlv1.Reader, refused(err))
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(s.bundle) {
		return nil, fmt.Errorf("ConfigMap %s/%s holds no CA certificate", rootNamespace, controlv1.ServerConfigMap)
	}
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS13, NextProtos: []string{"http/1.1"}}}
	return &control{server: s, token: token.Status.Token, client: &http.Client{Transport: transport, Timeout: 30 * time.Second}}, nil
}

func (c *control) get(ctx context.Context, path string, into any) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+c.server.address+path, nil)
	if err != nil {
		return err
	}
	req.Header.Set("Authorization", "Bearer "+c.token)
	resp, err := c.client.Do(req)
	if err != nil {
		return fmt.Errorf("ask isthmusd: %w (is %s reachable from here? else give --server)", err, c.server.address)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		var e controlv1.Error
		if err := json.NewDecoder(resp.Body).Decode(&e); err != nil || e.Error == "" {
			return fmt.Errorf("isthmusd answered %s", resp.Status)
		}
		return errors.New(e.Error)
	}
	return json.NewDecoder(resp.Body).Decode(into)
}
