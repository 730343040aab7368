{{/* Environment variables of files/ictx_oidc.py; empty without an OpenID provider. */}}
{{- define "mlflow.oidcEnv" -}}
{{- with .Values.auth.oidc }}
{{- if .issuer -}}
- name: OIDC_ISSUER
  value: {{ .issuer | quote }}
- name: OIDC_CLIENT_ID
  value: {{ .clientId | quote }}
- name: OIDC_CLIENT_SECRET
  valueFrom:
    secretKeyRef:
      name: {{ .existingSecret }}
      key: client-secret
- name: OIDC_URL
  value: {{ .url | quote }}
- name: OIDC_USERNAME_CLAIM
  value: {{ .usernameClaim | quote }}
- name: OIDC_SCOPES
  value: {{ join " " .scopes | quote }}
- name: OIDC_SESSION_HOURS
  value: {{ .sessionHours | int | quote }}
{{- if .caSecret }}
- name: OIDC_CA_FILE
  value: /etc/mlflow-provider/ca.crt
{{- end }}
{{- end }}
{{- end }}
{{- end }}
