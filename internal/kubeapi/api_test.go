package kubeapi

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"testing"

	authenticationv1 "k8s.io/api/authentication/v1"
	certificatesv1 "k8s.io/api/certificates/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
)

// TestAPI asks one server for what the mesh and its users rely on.
func TestAPI(t *testing.T) {
	t.Parallel()
	c := startChild(t, testOptions(t))
	tests := map[string]func(*testing.T, *Child){
		"anonymous":       testAnonymous,
		"files":           testFiles,
		"tokens":          testTokens,
		"rbac":            testRBAC,
		"controllers":     testControllers,
		"resource quota":  testResourceQuota,
		"sign client":     testSignClient,
		"defaults":        testDefaults,
		"crds":            testCRDs,
		"webhook by url":  testWebhook,
		"workload groups": testWorkloadAPIs,
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			test(t, c)
		})
	}
}

func testAnonymous(t *testing.T, c *Child) {
	for path, want := range map[string]int{
		"/readyz": http.StatusOK, "/livez": http.StatusOK, "/healthz": http.StatusOK,
		"/api": http.StatusUnauthorized, "/version": http.StatusUnauthorized, "/openapi/v3": http.StatusUnauthorized,
		"/api/v1/namespaces": http.StatusUnauthorized, "/metrics": http.StatusUnauthorized, "/readyz/etcd": http.StatusUnauthorized,
	} {
		if got := anonymousStatus(t, c, path); got != want {
			t.Errorf("GET %s without credentials: %d, want %d", path, got, want)
		}
	}
}

func testFiles(t *testing.T, c *Child) {
	dir := filepath.Dir(c.Kubeconfig())
	if mode := mustStat(t, dir); mode != 0o700 {
		t.Errorf("data directory has mode %o, want 700", mode)
	}
	files, err := filepath.Glob(filepath.Join(dir, "pki", "*"))
	if err != nil || len(files) == 0 {
		t.Fatalf("files of the PKI: %v, %v", files, err)
	}
	for _, f := range append(files, c.Kubeconfig()) {
		if mode := mustStat(t, f); mode != 0o600 {
			t.Errorf("%s has mode %o, want 600", f, mode)
		}
	}
	if _, err := os.Stat(filepath.Join(dir, "etcd-peer.sock")); err != nil {
		t.Errorf("etcd's peer socket is not in the closed directory: %v", err)
	}
}

func requestToken(t *testing.T, client kubernetes.Interface, namespace, audience string) string {
	t.Helper()
	r, err := client.CoreV1().ServiceAccounts(namespace).CreateToken(t.Context(), "default",
		&authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{Audiences: []string{audience}}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return r.Status.Token
}

func reviewToken(t *testing.T, client kubernetes.Interface, token, audience string) authenticationv1.TokenReviewStatus {
	t.Helper()
	r, err := client.AuthenticationV1().TokenReviews().Create(t.Context(),
		&authenticationv1.TokenReview{Spec: authenticationv1.TokenReviewSpec{Token: token, Audiences: []string{audience}}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return r.Status
}

func testTokens(t *testing.T, c *Child) {
	client := clientOf(t, c.Config())
	createNamespace(t, client, "tokens")
	token := requestToken(t, client, "tokens", "istio-ca")
	got := reviewToken(t, client, token, "istio-ca")
	if !got.Authenticated || got.User.Username != "system:serviceaccount:tokens:default" || !slices.Equal(got.Audiences, []string{"istio-ca"}) {
		t.Errorf("review of a token for istio-ca: %+v", got)
	}
	if got := reviewToken(t, client, token, "other"); got.Authenticated {
		t.Errorf("a token for istio-ca passes for another audience: %+v", got)
	}
	other := requestToken(t, client, "tokens", "other")
	if got := reviewToken(t, client, other, "istio-ca"); got.Authenticated {
		t.Errorf("a token for another audience passes for istio-ca: %+v", got)
	}
	if got := reviewToken(t, client, other, "other"); !got.Authenticated {
		t.Errorf("a token for an audience that the API itself has not: %+v", got)
	}
	// What a sidecar or the command line holds for isthmusd opens nothing else.
	for _, audience := range []string{"istio-ca", "isthmusd"} {
		cfg := rest.AnonymousClientConfig(c.Config())
		cfg.BearerToken = requestToken(t, client, "tokens", audience)
		if _, err := clientOf(t, cfg).Discovery().ServerVersion(); !apierrors.IsUnauthorized(err) {
			t.Errorf("the API takes a token for %s: %v, want unauthorized", audience, err)
		}
	}
}

func testRBAC(t *testing.T, c *Child) {
	admin := clientOf(t, c.Config())
	createNamespace(t, admin, "rbac")
	cfg := rest.AnonymousClientConfig(c.Config())
	cfg.BearerToken = requestToken(t, admin, "rbac", "https://kubernetes.default.svc.cluster.local")
	account := clientOf(t, cfg)
	if _, err := account.CoreV1().Pods("rbac").List(t.Context(), metav1.ListOptions{}); !apierrors.IsForbidden(err) {
		t.Fatalf("pods without a role: %v, want forbidden", err)
	}
	_, err := admin.RbacV1().RoleBindings("rbac").Create(t.Context(), &rbacv1.RoleBinding{
		ObjectMeta: metav1.ObjectMeta{Name: "view"},
		RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: "view"},
		Subjects:   []rbacv1.Subject{{Kind: rbacv1.ServiceAccountKind, Namespace: "rbac", Name: "default"}},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, func() error { // the role is aggregated of others by a controller
		_, err := account.CoreV1().Pods("rbac").List(t.Context(), metav1.ListOptions{})
		return err
	})
	if _, err := account.CoreV1().Secrets("rbac").List(t.Context(), metav1.ListOptions{}); !apierrors.IsForbidden(err) {
		t.Errorf("secrets with role view: %v, want forbidden", err)
	}
}

func testControllers(t *testing.T, c *Child) {
	client := clientOf(t, c.Config())
	createNamespace(t, client, "controllers")
	maps := client.CoreV1().ConfigMaps("controllers")
	eventually(t, func() error {
		_, err := maps.Get(t.Context(), "kube-root-ca.crt", metav1.GetOptions{})
		return err
	})
	owner, err := maps.Create(t.Context(), &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "owner"}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	_, err = maps.Create(t.Context(), &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{
		Name:            "owned",
		OwnerReferences: []metav1.OwnerReference{{APIVersion: "v1", Kind: "ConfigMap", Name: owner.Name, UID: owner.UID}},
	}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if err := maps.Delete(t.Context(), "owner", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	gone := func(get func() error) func() error {
		return func() error {
			if err := get(); !apierrors.IsNotFound(err) {
				return fmt.Errorf("still there: %w", errors.Join(err))
			}
			return nil
		}
	}
	eventually(t, gone(func() error { _, err := maps.Get(t.Context(), "owned", metav1.GetOptions{}); return err }))
	if err := client.CoreV1().Namespaces().Delete(t.Context(), "controllers", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, gone(func() error {
		_, err := client.CoreV1().Namespaces().Get(t.Context(), "controllers", metav1.GetOptions{})
		return err
	}))
}

func testResourceQuota(t *testing.T, c *Child) {
	client := clientOf(t, c.Config())
	createNamespace(t, client, "quota")
	_, err := client.CoreV1().ResourceQuotas("quota").Create(t.Context(), &corev1.ResourceQuota{
		ObjectMeta: metav1.ObjectMeta{Name: "one-secret"},
		Spec:       corev1.ResourceQuotaSpec{Hard: corev1.ResourceList{corev1.ResourceSecrets: resource.MustParse("1")}},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for made := 0; ; made++ { // the plugin takes a moment to know of it
		_, err := client.CoreV1().Secrets("quota").Create(t.Context(), &corev1.Secret{ObjectMeta: metav1.ObjectMeta{GenerateName: "s-"}}, metav1.CreateOptions{})
		if apierrors.IsForbidden(err) {
			break
		}
		if err != nil || made == 1000 {
			t.Fatalf("%d secrets made beyond a quota of 1: %v", made, err)
		}
	}
	eventually(t, func() error { // without the controller nothing could be made any more
		quota, err := client.CoreV1().ResourceQuotas("quota").Get(t.Context(), "one-secret", metav1.GetOptions{})
		if used := quota.Status.Used[corev1.ResourceSecrets]; err == nil && used.IsZero() {
			err = errors.New("usage is not counted")
		}
		return err
	})
}

// testSignClient has the API issue a certificate for a person who has a key.
func testSignClient(t *testing.T, c *Child) {
	client := clientOf(t, c.Config())
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: pkix.Name{CommonName: "ann"}}, key)
	if err != nil {
		t.Fatal(err)
	}
	requests := client.CertificatesV1().CertificateSigningRequests()
	csr, err := requests.Create(t.Context(), &certificatesv1.CertificateSigningRequest{
		ObjectMeta: metav1.ObjectMeta{Name: "ann"},
		Spec: certificatesv1.CertificateSigningRequestSpec{
			Request:    pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}),
			SignerName: certificatesv1.KubeAPIServerClientSignerName,
			Usages:     []certificatesv1.KeyUsage{certificatesv1.UsageClientAuth},
		},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	csr.Status.Conditions = []certificatesv1.CertificateSigningRequestCondition{{
		Type: certificatesv1.CertificateApproved, Status: corev1.ConditionTrue, Reason: "Test",
	}}
	if _, err := requests.UpdateApproval(t.Context(), "ann", csr, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() error {
		csr, err = requests.Get(t.Context(), "ann", metav1.GetOptions{})
		if err == nil && len(csr.Status.Certificate) == 0 {
			err = errors.New("no certificate issued")
		}
		return err
	})
	keyDER, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	cfg := rest.AnonymousClientConfig(c.Config())
	cfg.CertData, cfg.KeyData = csr.Status.Certificate, pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: keyDER})
	who, err := clientOf(t, cfg).AuthenticationV1().SelfSubjectReviews().Create(t.Context(), &authenticationv1.SelfSubjectReview{}, metav1.CreateOptions{})
	if err != nil || who.Status.UserInfo.Username != "ann" {
		t.Errorf("the certificate's user: %v, %v, want ann", who, err)
	}
}

func testWorkloadAPIs(t *testing.T, c *Child) {
	groups, err := clientOf(t, c.Config()).Discovery().ServerGroups()
	if err != nil {
		t.Fatal(err)
	}
	served := map[string]bool{}
	for _, g := range groups.Groups {
		served[g.Name] = true
	}
	for _, g := range []string{"", "apps", "batch", "autoscaling", "policy", "networking.k8s.io", "certificates.k8s.io", "discovery.k8s.io", "coordination.k8s.io"} {
		if !served[g] {
			t.Errorf("group %q is not served", g)
		}
	}
}
